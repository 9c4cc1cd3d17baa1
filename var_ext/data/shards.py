"""Tar shards as WebDataset writes them: `ShardDataset`, each picture found by its place in its shard."""

import re
import tarfile
from collections.abc import Iterator
from glob import glob
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from var_ext.data.dataset import SPLIT_NAMES, DataError, check_split
from var_ext.data.image_folder import SUFFIXES
from var_ext.data.index import Entry, Found, Index, open_index
from var_ext.data.picture_dataset import PictureDataset
from var_ext.data.reading import Bytes, look_at
from var_ext.paths import user_path

SPLIT, CLASSES = "{split}", "classes.txt"
Sample = dict[
    str, tarfile.TarInfo
]  # what follows the first dot of a name, in small letters -> a file of the sample


class ShardDataset(PictureDataset):
    """Pictures in uncompressed tar files, see `PictureDataset`.

    Files of a sample follow each other and share the name before the first dot: an image, and a label as a whole number
    in NAME.cls. A file classes.txt beside the shards names the classes, one a line; else their numbers do. The shards
    are read once, when the index is made (see `var_ext.data.index`), and then at random.

    Args:
        pattern: of the shards, with * and ?, such as data/imagenet-{split}-*.tar; {split} stands for train, val
            (validation, valid) and test. Without it, a tenth of each class is for validation, as in a folder.

    Raises:
        DataError: no shard, a compressed or broken one, a sample without image or label, a broken picture.
    """

    def __init__(self, pattern: str, split: str, image_size: int, **options: Any) -> None:
        super().__init__(f"wds:{pattern}", split, image_size, **options)
        shards = train = find_shards(pattern, "train")
        index = known = _indexed(train)
        if SPLIT in pattern:
            shards = find_shards(pattern, split)
            index = known if split == "train" else _indexed(shards)
            rows = np.arange(len(index.names))
        else:
            rows = index.split_rows(split, pattern)
        self.shards = shards
        count = int(known.labels.max()) + 1
        classes = list(known.classes) or [str(number) for number in range(count)]
        top = int(index.labels[rows].max())
        if top >= len(classes):
            raise DataError(
                f"labels of {self.spec} must be below {len(classes)}, the number of classes, got {top}"
            )
        self.use(index, rows, classes, index.labels[rows])

    def file(self, row: int) -> Bytes:
        number, start = self.index.places[row]
        with open(self.shards[number], "rb") as shard:
            shard.seek(start)
            return Bytes(shard.read(self.index.sizes[row]), self.index.names[row])


def find_shards(pattern: str, split: str) -> list[Path]:
    """The shards of a split, sorted. Raises DataError if there are none."""
    check_split(split)
    tried = [pattern.replace(SPLIT, name) for name in SPLIT_NAMES[split]] if SPLIT in pattern else [pattern]
    for each in tried:
        if found := sorted(glob(str(user_path(each)))):
            return [Path(path).resolve() for path in found]
    braces = "; * stands for a range such as {00..12}" if re.search(r"\{.*\.\.", pattern) else ""
    raise DataError(f"wanted tar shards of the split {split}, got none under {' or '.join(tried)}{braces}")


def _indexed(shards: list[Path]) -> Index:
    stamps = shards + [path for path in [shards[0].with_name(CLASSES)] if path.is_file()]

    def search() -> Found:
        lines = [path.read_text(encoding="utf-8").splitlines() for path in stamps[len(shards) :]]
        return Found(lines[0] if lines else [], _looks(shards), stamps)

    return open_index("\n".join(map(str, ["wds", *stamps])), search)


def _looks(shards: list[Path]) -> Iterator[Entry]:
    for number, path in enumerate(shards):
        try:
            with tarfile.open(path, "r:") as shard:
                for name, sample in _samples(shard):
                    yield _look(path, number, shard, name, sample)
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"wanted an uncompressed tar file, got {path}: {error}") from error


def _samples(shard: tarfile.TarFile) -> Iterator[tuple[str, Sample]]:
    def key(member: tarfile.TarInfo) -> str:
        path = PurePosixPath(member.name)
        return str(path.with_name(path.name.split(".")[0]))

    for name, members in groupby((member for member in shard if member.isfile()), key):
        yield name, {member.name[len(name) + 1 :].lower(): member for member in members}


def _look(path: Path, number: int, shard: tarfile.TarFile, name: str, sample: Sample) -> Entry:
    images = [suffix for suffix in sample if f".{suffix.rpartition('.')[2]}" in SUFFIXES]
    if len(images) != 1 or "cls" not in sample:
        raise DataError(f"wanted an image and a label {name}.cls in {path}, got {', '.join(sample)}")
    label, image = shard.extractfile(sample["cls"]), sample[images[0]]
    handle = shard.extractfile(image)
    assert label is not None and handle is not None  # both are files
    text = label.read().decode(errors="replace").strip()
    if not text.isdecimal():
        raise DataError(f"wanted a class number in {name}.cls of {path}, got {text!r}")
    seen = look_at(Bytes(handle.read(), f"{path}: {image.name}"))
    return Entry(f"{path.name}/{image.name}", int(text), (number, image.offset_data), seen)
