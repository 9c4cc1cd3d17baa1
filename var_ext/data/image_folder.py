"""A folder of class folders of images: ROOT/{train,val[,test]}/CLASS/* or ROOT/CLASS/* with a hashed split.

To accept another image format, add its suffix to `SUFFIXES`.
"""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from var_ext.data.dataset import DataError
from var_ext.data.index import Entry, Found, Index, open_index
from var_ext.data.picture_dataset import PictureDataset
from var_ext.data.reading import Look, head_digest, look_at
from var_ext.paths import user_path

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
IMAGES = f"images ({', '.join(SUFFIXES)})"
WANTED = f"wanted a folder of class folders of {IMAGES}"
STAMPED = 10_000  # files of a folder whose size and time are compared at each start, evenly spread
THREADS = 8  # files looked at at once: on a network, most of the time is waiting


class FolderDataset(PictureDataset):
    """Images of a folder, see `PictureDataset`.

    The first time, all files are looked at and an index is made (see `var_ext.data.index`). It is made again after
    files came, went or were renamed, or one of the `STAMPED` files changed; any other that changed is refused when it
    is read.

    Raises:
        DataError: missing, empty, mixed or nested folder, a class without images, a file that is not an image,
            truncated or of unknown gray scale; when an image is read: damaged pixel data, or not the file of the index.
    """

    def __init__(self, root: str | Path, split: str, image_size: int, **options: Any) -> None:
        super().__init__(str(root), split, image_size, **options)
        self.root = user_path(root)
        self.folder, index, rows, classes = _open(self.root, split)
        # a split may lack classes of train
        numbers = np.array([classes.index(name) for name in index.classes])
        self.use(index, rows, classes, numbers[index.labels[rows]])

    @property
    def paths(self) -> list[Path]:
        """The file of every image."""
        return [self.folder / self.index.names[row] for row in self.rows]

    def file(self, row: int) -> Path:
        path, index = self.folder / self.index.names[row], self.index
        try:
            stat = os.stat(path)
            same = stat.st_size == index.sizes[row]
            if same and stat.st_mtime_ns != index.places[row, 0]:  # touched, or written anew
                with open(path, "rb") as handle:
                    same = head_digest(handle) == index.digests[row].tobytes()
        except OSError as error:
            raise DataError(f"could not read {path}: {error.strerror or error}") from error
        if not same:
            raise DataError(f"{path} has changed since it was indexed: touch {path.parent} and start again")
        return path


def _open(root: Path, split: str) -> tuple[Path, Index, np.ndarray, list[str]]:
    """The folder of class folders of a split, its index, the rows that belong to the split, and the classes of all."""
    if not root.is_dir():
        came = "is not a folder" if root.exists() else "does not exist"
        raise DataError(
            f"data must be 'digits', wds:PATTERN, hf:NAME or a folder of class folders, got {root}, which {came}"
        )
    if not (root / "train").is_dir():
        index = _indexed(root)
        rows = index.split_rows(split, f"{root}, a folder of {_names(root)}")
        return root, index, rows, list(index.classes)
    _refuse_loose(root, "the split folders")
    if not (root / split).is_dir():
        raise DataError(f"wanted the split folders train and {split} in {root}, got {_names(root)}")
    train = _indexed(root / "train")
    index = train if split == "train" else _indexed(root / split)
    foreign = sorted(set(index.classes) - set(train.classes))
    if foreign:
        raise DataError(
            f"classes of {root / split} must be among those of train, got {', '.join(foreign)} besides"
        )
    return root / split, index, np.arange(len(index.names)), list(train.classes)


def _indexed(folder: Path) -> Index:
    folder = folder.resolve()
    return open_index(f"folder {folder}", lambda: _search(folder))


def _search(folder: Path) -> Found:
    found = _classes(folder)
    names = [f"{name}/{file}" for name, files in found.items() for file in files]
    labels = [label for label, files in enumerate(found.values()) for _ in files]
    spread = np.unique(np.linspace(0, len(names) - 1, STAMPED).astype(int))
    stamps = [folder, *(folder / name for name in found), *(folder / names[i] for i in spread)]
    log.info("looking at %d pictures of %s", len(names), folder)
    return Found(list(found), _looks(folder, names, labels), stamps)


def _looks(folder: Path, names: list[str], labels: list[int]) -> Iterator[Entry]:
    def look(name: str, label: int) -> Entry:
        path = folder / name
        seen = look_at(path)
        return Entry(name, label, (path.stat().st_mtime_ns if isinstance(seen, Look) else 0, 0), seen)

    pairs = zip(names, labels, strict=True)
    with ThreadPoolExecutor(THREADS) as pool:
        while some := list(islice(pairs, 1000)):
            yield from pool.map(look, *zip(*some, strict=True))


def _classes(folder: Path) -> dict[str, list[str]]:
    """Class name -> names of its image files, both in sorted order."""
    classes = [entry.name for entry in _entries(folder) if entry.is_dir()]
    _refuse_loose(folder, "the class folders" if classes else "no class folder")
    wanted = f"{WANTED}, got {folder}"
    if not classes:
        raise DataError(f"{wanted}, which has no class folder")
    found: dict[str, list[str]] = {}
    nested, ignored = [], []
    for name in classes:
        entries = _entries(folder / name)
        found[name] = [entry.name for entry in entries if _is_image(entry)]
        nested += [entry.path for entry in entries if entry.is_dir()]
        ignored += [entry.name for entry in entries if not _is_image(entry)]
    if nested:
        raise DataError(f"{wanted} with {len(nested)} folders inside the class folders, such as {nested[0]}")
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise DataError(f"{wanted} where these classes have no image: {', '.join(empty)}")
    if ignored:
        suffixes = ", ".join(sorted({os.path.splitext(name)[1] or name for name in ignored}))
        log.warning("ignoring %d files in %s that are no %s: %s", len(ignored), folder, IMAGES, suffixes)
    return found


def _refuse_loose(folder: Path, others: str) -> None:
    loose = [entry.name for entry in _entries(folder) if _is_image(entry)]
    if loose:
        raise DataError(
            f"{WANTED}, got {folder} with images beside {others}: {loose[0]} and {len(loose) - 1} more"
        )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder except hidden files, sorted."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)


def _is_image(entry: os.DirEntry[str]) -> bool:
    return os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file()


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
