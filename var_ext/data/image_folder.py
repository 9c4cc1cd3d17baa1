"""A folder of class folders of images: ROOT/{train,val[,test]}/CLASS/* or ROOT/CLASS/* with a hashed split.

To accept another image format, add its suffix to `SUFFIXES`; to change the crop, change `FolderDataset.load`.
"""

import hashlib
import logging
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from var_ext.data.dataset import DataError, ImageDataset, check_split, readable, stable_order
from var_ext.data.pictures import resized
from var_ext.data.reading import check_picture, read_rgb
from var_ext.paths import user_path

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
IMAGES = f"images ({', '.join(SUFFIXES)})"
WANTED = f"wanted a folder of class folders of {IMAGES}"
HEAD = 4096  # bytes of each file in the fingerprint, besides its size
VAL_SHARE = 0.1
MARGIN = 1.125  # shorter side before the crop, in units of the image size (published recipe)


class FolderDataset(ImageDataset):
    """Images of a folder; shorter side to 1.125 x `image_size` (Lanczos), then a crop, no flip.

    The crop is random where `augment` > 0 and central otherwise.

    Raises:
        DataError: missing, empty, mixed or nested folder, a class without images; when the fingerprint is
            taken: a file that is not an image, truncated or of unknown gray scale; when an image is read:
            damaged pixel data.
    """

    def __init__(
        self, root: str | Path, split: str, image_size: int, *, augment: float = 0.0, seed: int = 0
    ) -> None:
        check_split(split)
        self.spec, self.split, self.image_size = str(root), split, image_size
        self.augment, self.seed = float(augment), seed
        self.root = user_path(root)
        found = _find(self.root, split)
        self.class_names = [readable(name) for name in found]
        self.paths = [path for paths in found.values() for path in paths]
        self.labels = torch.tensor(
            [i for i, paths in enumerate(found.values()) for _ in paths], dtype=torch.int64
        )

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Tensor:
        path, size = self.paths[index], self.image_size
        image = resized(read_rgb(path), round(MARGIN * size), Image.Resampling.LANCZOS)
        width, height = image.size
        if self.augment > 0:
            rng = self.rng(index)
            left, top = int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))
        else:
            left, top = (width - size) // 2, (height - size) // 2
        pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)  # (S, S, 3)
        return torch.from_numpy(pixels.transpose(2, 0, 1) / np.float32(127.5) - 1)

    def describe(self) -> Iterable[str]:
        return self._seen

    @cached_property
    def _seen(self) -> list[str]:
        """Name, size and first bytes of every file: a copy of the folder elsewhere is the same data set, and
        checking header and end of each finds most broken files before hours of work."""
        lines = []
        for path in self.paths:
            check_picture(path)
            with open(path, "rb") as file:
                head = hashlib.sha256(file.read(HEAD)).hexdigest()
            lines.append(f"{path.relative_to(self.root).as_posix()} {path.stat().st_size} {head}")
        return lines


def _find(root: Path, split: str) -> dict[str, list[Path]]:
    """Class name -> image files of the split, both in sorted order."""
    if not root.is_dir():
        came = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"data must be 'digits' or a folder of class folders, got {root}, which {came}")
    if not (root / "train").is_dir():
        return _hashed_split(_classes(root), root, split)
    _refuse_loose(root, "the split folders")
    if not (root / split).is_dir():
        raise DataError(f"wanted the split folders train and {split} in {root}, got {_names(root)}")
    train = _classes(root / "train")
    chosen = train if split == "train" else _classes(root / split)
    foreign = sorted(set(chosen) - set(train))
    if foreign:
        raise DataError(
            f"classes of {root / split} must be among those of train, got {', '.join(foreign)} besides"
        )
    return {name: chosen.get(name, []) for name in train}


def _classes(folder: Path) -> dict[str, list[Path]]:
    classes = [path for path in _entries(folder) if path.is_dir()]
    _refuse_loose(folder, "the class folders" if classes else "no class folder")
    wanted = f"{WANTED}, got {folder}"
    if not classes:
        raise DataError(f"{wanted}, which has no class folder")
    inside = {path.name: _entries(path) for path in classes}
    nested = [path for files in inside.values() for path in files if path.is_dir()]
    if nested:
        raise DataError(f"{wanted} with {len(nested)} folders inside the class folders, such as {nested[0]}")
    found = {name: [file for file in files if _is_image(file)] for name, files in inside.items()}
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise DataError(f"{wanted} where these classes have no image: {', '.join(empty)}")
    ignored = [file for files in inside.values() for file in files if not _is_image(file)]
    if ignored:
        suffixes = ", ".join(sorted({file.suffix or file.name for file in ignored}))
        log.warning("ignoring %d files in %s that are no %s: %s", len(ignored), folder, IMAGES, suffixes)
    return found


def _refuse_loose(folder: Path, others: str) -> None:
    loose = [path.name for path in _entries(folder) if _is_image(path)]
    if loose:
        raise DataError(
            f"{WANTED}, got {folder} with images beside {others}: {loose[0]} and {len(loose) - 1} more"
        )


def _entries(folder: Path) -> list[Path]:
    """The entries of a folder except hidden files, sorted."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _hashed_split(found: dict[str, list[Path]], root: Path, split: str) -> dict[str, list[Path]]:
    """A tenth of each class is val, at least one image if it has two; the choice depends only on names."""
    if split == "test":
        raise DataError(
            f"wanted the split folders train, val and test in {root}, got {_names(root)}: no test split"
        )
    parts: dict[str, list[Path]] = {}
    for name, files in found.items():
        order = stable_order([f"{name}/{file.name}" for file in files], "folder")
        count = max(1, round(VAL_SHARE * len(files))) if len(files) > 1 else 0
        parts[name] = sorted(files[i] for i in (order[:count] if split == "val" else order[count:]))
    if not any(parts.values()):
        raise DataError(
            f"wanted at least one class with two images in {root}, so that one can validate; got none"
        )
    return parts


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
