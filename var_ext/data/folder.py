"""A folder of class folders of images: ROOT/{train,val[,test]}/CLASS/* or ROOT/CLASS/* with a hashed split.

To accept another image format, add its suffix to `SUFFIXES`; to change the crop, change `FolderDataset.load`.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from var_ext.data.dataset import DataError, ImageDataset, check_split, stable_order

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VAL_SHARE = 0.1
MARGIN = 1.125  # shorter side before the crop, in units of the image size (published recipe)


class FolderDataset(ImageDataset):
    """Images of a folder; shorter side to 1.125 x `image_size` (Lanczos), then a crop, no flip.

    The crop is random where `augment` > 0 and central otherwise.

    Raises:
        DataError: missing, empty or mixed folder, a class without images; when an image is read: a broken
            file.
    """

    def __init__(
        self, root: str | Path, split: str, image_size: int, *, augment: float = 0.0, seed: int = 0
    ) -> None:
        check_split(split)
        self.spec, self.split, self.image_size = str(root), split, image_size
        self.augment, self.seed = float(augment), seed
        self.root = Path(root)
        found = _find(self.root, split)
        self.class_names = list(found)
        self.paths = [path for paths in found.values() for path in paths]
        self.labels = torch.tensor(
            [i for i, paths in enumerate(found.values()) for _ in paths], dtype=torch.int64
        )

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Tensor:
        path, size = self.paths[index], self.image_size
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        # Pillow reports broken files by many classes, from OSError to SyntaxError and struct.error.
        except Exception as error:
            raise DataError(f"wanted a readable image, got {path}: {error}") from error
        side = round(MARGIN * size)
        ratio = side / min(image.size)
        width, height = max(side, round(image.width * ratio)), max(side, round(image.height * ratio))
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        if self.augment > 0:
            rng = self.rng(index)
            left, top = int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))
        else:
            left, top = (width - size) // 2, (height - size) // 2
        pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)  # (S, S, 3)
        return torch.from_numpy(pixels.transpose(2, 0, 1) / np.float32(127.5) - 1)

    def describe(self) -> Iterable[str]:
        for path in self.paths:
            stat = path.stat()
            yield f"{path.relative_to(self.root).as_posix()} {stat.st_size} {stat.st_mtime_ns}"


def _find(root: Path, split: str) -> dict[str, list[Path]]:
    """Class name -> image files of the split, both in sorted order."""
    if not root.is_dir():
        came = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"data must be 'digits' or a folder of class folders, got {root}, which {came}")
    if not (root / "train").is_dir():
        return _hashed_split(_classes(root), root, split)
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
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    loose = [path.name for path in entries if _is_image(path)]
    classes = [path for path in entries if path.is_dir()]
    wanted = f"wanted a folder of class folders of images ({', '.join(SUFFIXES)}), got {folder}"
    if loose and classes:
        raise DataError(
            f"{wanted} with images beside the class folders: {loose[0]} and {len(loose) - 1} more"
        )
    if loose:
        raise DataError(
            f"{wanted} with {len(loose)} images and no class folder; move them into one folder a class"
        )
    if not classes:
        raise DataError(f"{wanted}, which has no class folder")
    found = {path.name: sorted(file for file in path.iterdir() if _is_image(file)) for path in classes}
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise DataError(f"{wanted} where these classes have no image: {', '.join(empty)}")
    return found


def _hashed_split(found: dict[str, list[Path]], root: Path, split: str) -> dict[str, list[Path]]:
    """A tenth of each class is val, one image at least if it has two; which ones hangs on names alone."""
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
    return path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
