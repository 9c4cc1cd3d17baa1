"""Tar shards and data sets of Hugging Face: the pictures of a folder, from elsewhere."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from var_ext.data import DataError, load_dataset

COUNT = 20  # pictures, in two classes


def jpeg(i: int) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def shard(path: Path, files: dict[str, bytes], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def samples(numbers: range) -> dict[str, bytes]:
    files = {}
    for i in numbers:
        files |= {
            f"dir/{i:04d}.jpg": jpeg(i),
            f"dir/{i:04d}.cls": str(i % 2).encode(),
            f"dir/{i:04d}.json": b"{}",
        }
    return files


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of train, one of validation."""
    shard(tmp_path / "a-train-0.tar", samples(range(10)))
    shard(tmp_path / "a-train-1.tar", samples(range(10, 16)))
    shard(tmp_path / "a-validation-0.tar", samples(range(16, COUNT)))
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same pictures as files, in the same order."""
    for i in range(COUNT):
        path = tmp_path / "folder" / ("train" if i < 16 else "val") / str(i % 2) / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    return tmp_path / "folder"


def same(one: Any, other: Any, order: list[int]) -> bool:
    """Images and labels of two data sets agree; augmentation follows places, so it is left out."""
    images, labels = one.batch(range(len(one)))
    wanted, known = other.batch(order)
    return torch.equal(images, wanted) and torch.equal(labels, known)


def test_shards_hold_the_pictures_of_a_folder(shards: Path, folder: Path) -> None:
    train, val = (load_dataset(f"wds:{shards}/a-{{split}}-?.tar", split, 8) for split in ("train", "val"))
    assert (len(train), len(val), train.class_names) == (16, 4, ["0", "1"])
    order = sorted(range(16), key=lambda i: (i % 2, i))  # a folder goes class by class
    assert same(train, load_dataset(folder, "train", 8), [order.index(i) for i in range(16)])
    assert train.fingerprint() != val.fingerprint()
    augmented = load_dataset(f"wds:{shards}/a-{{split}}-?.tar", "train", 8, augment=1)
    assert augmented.load(3, [0, 1, 2, 3]).unique(dim=0).shape[0] > 1


def test_shards_without_splits_are_split_as_a_folder_is(shards: Path) -> None:
    train, val = (load_dataset(f"wds:{shards}/a-train-*.tar", split, 8) for split in ("train", "val"))
    assert (len(train), len(val)) == (14, 2) and val.labels.tolist() in ([0, 1], [1, 0])
    with pytest.raises(DataError, match="has no test split"):
        load_dataset(f"wds:{shards}/a-train-*.tar", "test", 8)


def test_classes_have_the_names_of_a_file(shards: Path) -> None:
    (shards / "classes.txt").write_text("cat\ndog\nemu\n")
    assert load_dataset(f"wds:{shards}/a-{{split}}-*.tar", "val", 8).class_names == ["cat", "dog", "emu"]
    (shards / "classes.txt").write_text("cat\n")
    with pytest.raises(DataError, match="must be below 1, the number of classes, got 1"):
        load_dataset(f"wds:{shards}/a-{{split}}-*.tar", "val", 8)


def test_a_shard_that_changed_is_read_again(shards: Path) -> None:
    spec = f"wds:{shards}/a-{{split}}-*.tar"
    before = load_dataset(spec, "val", 8).fingerprint()
    shard(shards / "a-validation-0.tar", samples(range(17, 21)))
    assert load_dataset(spec, "val", 8).fingerprint() != before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.jpg": jpeg(0)}, r"wanted an image and a label 0\.cls in .*, got jpg"),
        ({"0.cls": b"1", "0.txt": b""}, "got cls, txt"),
        ({"0.jpg": jpeg(0), "0.cls": b"cat"}, "wanted a class number in 0.cls of .*, got 'cat'"),
        ({"0.jpg": jpeg(0)[:-90], "0.cls": b"1"}, r"wanted a readable image, got .*x\.tar: 0\.jpg"),
    ],
)
def test_samples_that_cannot_be_used(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    shard(tmp_path / "x.tar", files)
    with pytest.raises(DataError, match=message):
        load_dataset(f"wds:{tmp_path}/x.tar", "train", 8)


def test_shards_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"got none under .*/{0\.\.3}\.tar; \* stands for a range"):
        load_dataset(f"wds:{tmp_path}/{{0..3}}.tar", "train", 8)
    shard(tmp_path / "train.tar", samples(range(2)))
    with pytest.raises(DataError, match=r"got none under .*val\.tar or .*validation\.tar or .*valid\.tar"):
        load_dataset(f"wds:{tmp_path}/{{split}}.tar", "val", 8)
    shard(tmp_path / "x.tar", samples(range(2)), "w:gz")
    with pytest.raises(DataError, match=r"wanted an uncompressed tar file, got .*x\.tar"):
        load_dataset(f"wds:{tmp_path}/x.tar", "train", 8)


# ---------------------------------------------------------------------- Hugging Face


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set on disk with the splits train and validation."""
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features(picture=datasets.Image(), kind=datasets.ClassLabel(names=["cat", "dog"]))
    parts = {
        name: datasets.Dataset.from_dict(
            {"picture": [{"bytes": jpeg(i), "path": None} for i in rows], "kind": [i % 2 for i in rows]},
            features=kinds,
        )
        for name, rows in (("train", range(16)), ("validation", range(16, COUNT)))
    }
    datasets.disable_progress_bars()
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_data_set_holds_the_pictures_of_a_folder(saved: Path, folder: Path) -> None:
    train, val = (load_dataset(f"hf:{saved}", split, 8) for split in ("train", "val"))
    assert (len(train), len(val), train.class_names) == (16, 4, ["cat", "dog"])
    order = sorted(range(16), key=lambda i: (i % 2, i))
    assert same(train, load_dataset(folder, "train", 8), [order.index(i) for i in range(16)])
    assert train.fingerprint() != val.fingerprint()
    with pytest.raises(DataError, match=r"wanted the split test of hf:.*saved, got train, validation"):
        load_dataset(f"hf:{saved}", "test", 8)


def test_a_saved_split_is_split_as_a_folder_is(saved: Path) -> None:
    train, val = (load_dataset(f"hf:{saved}/train", split, 8) for split in ("train", "val"))
    assert (len(train), len(val)) == (14, 2)


def test_a_data_set_without_pictures_shows_its_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"wanted one column of images .*, got text: Value, label: Value"):
        load_dataset(f"hf:{tmp_path}/saved", "train", 8)


def test_a_broken_picture_of_a_data_set_is_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    pictures = [{"bytes": content, "path": None} for content in (jpeg(0), jpeg(1)[:-90])]
    table = datasets.Dataset.from_dict({"image": pictures, "label": [0, 0]})
    table.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"wanted a readable image, got hf:.*saved train row 1"):
        load_dataset(f"hf:{tmp_path}/saved", "train", 8)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'var_ext\[datasets\]'"):
        load_dataset("hf:name/of-it", "train", 8)
