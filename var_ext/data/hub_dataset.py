"""Data sets of the Hugging Face package `datasets`: `HubDataset`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from var_ext.data.dataset import SPLIT_NAMES, DataError
from var_ext.data.index import Entry, Found, Index, open_index
from var_ext.data.picture_dataset import PictureDataset
from var_ext.data.reading import Bytes, File, look_at
from var_ext.paths import user_path

SAVED = ("dataset_dict.json", "state.json")  # in folders that `save_to_disk` wrote


class HubDataset(PictureDataset):
    """The pictures of a data set with a column of images and one of class labels, see `PictureDataset`.

    Args:
        name: of the hub, such as "ILSVRC/imagenet-1k", or a folder that `save_to_disk` wrote. A data set with the
            split train alone, or without splits, keeps a tenth of each class for validation, as a folder does.

    Raises:
        DataError: the package is missing, the data set or the split is, it has not both columns, an image has no label
            or is broken.
    """

    def __init__(self, name: str, split: str, image_size: int, **options: Any) -> None:
        super().__init__(f"hf:{name}", split, image_size, **options)
        tables = _tables(name)
        whole = list(tables) == ["train"]
        found = [each for each in (["train"] if whole else SPLIT_NAMES[split]) if each in tables]
        if not found:
            raise DataError(
                f"wanted the split {' or '.join(SPLIT_NAMES[split])} of {self.spec}, got {', '.join(tables)}"
            )
        table = tables[found[0]]
        self.column, label, classes = _columns(table, self.spec)
        self.table = _undecoded(table, self.column)
        stamps = [Path(each["filename"]).resolve() for each in table.cache_files]
        self.place = f"{self.spec} {found[0]}"

        def search() -> Found:
            return Found(classes, self._looks(table[label]), stamps)

        # a table in memory has no files that could tell whether an index is up to date
        key = "\n".join(map(str, [self.place, *stamps]))
        index = open_index(key, search) if stamps else Index.of(search())
        rows = index.split_rows(split, self.spec) if whole else np.arange(len(index.names))
        names = list(index.classes) or [str(number) for number in range(int(index.labels.max()) + 1)]
        self.use(index, rows, names, index.labels[rows])

    def file(self, row: int) -> File:
        image = self.table[int(row)][self.column]
        name = f"{self.place} row {row}"
        return Path(image["path"]) if image["bytes"] is None else Bytes(image["bytes"], name)

    def _looks(self, labels: Any) -> Iterator[Entry]:
        for row, label in enumerate(labels):
            if label is None or label < 0:
                raise DataError(
                    f"wanted a class label of every image of {self.place}, got {label} in row {row}"
                )
            yield Entry(str(row), label, (row, 0), look_at(self.file(row)))


def _tables(name: str) -> dict[str, Any]:
    """Split -> table."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "hf: needs the package datasets, which is missing: pip install 'var_ext[datasets]'"
        ) from error
    folder = user_path(name)
    saved = any((folder / each).is_file() for each in SAVED)
    try:
        loaded = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(name)
    # that package lets through what dozens of others raise, from httpx to fsspec
    except Exception as error:
        raise DataError(
            f"could not load the data set {name}: {str(error).strip() or type(error).__name__}"
        ) from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _undecoded(table: Any, column: str) -> Any:
    """The column of images alone, as files."""
    import datasets

    return table.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _columns(table: Any, spec: str) -> tuple[str, str, list[str]]:
    """Names of the columns of images and labels, and the classes where the data set names them."""
    import datasets

    images = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = labels or [name for name in table.features if name == "label"]
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"wanted one column of images and one of class labels in {spec}, got "
            + ", ".join(f"{name}: {type(kind).__name__}" for name, kind in table.features.items())
        )
    return images[0], labels[0], list(getattr(table.features[labels[0]], "names", []))
