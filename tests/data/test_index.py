"""The index of a folder: made once, noticed to be stale, whole or not there."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from var_ext.data import DataError, image_folder, index, load_dataset
from var_ext.data.index import Entry, Found, Index, Names, open_index
from var_ext.data.reading import Look


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VAR_EXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of four pictures, all old."""
    for i in range(8):
        path = tmp_path / "pictures" / f"class{i % 2}" / f"{i}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, i, i)).save(path)
    age(tmp_path / "pictures")
    return tmp_path / "pictures"


def age(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (1e9, 1e9))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were looked at."""
    seen, look = [], image_folder.look_at

    def check(path: Path) -> Look | DataError:
        seen.append(path)
        return look(path)

    monkeypatch.setattr(image_folder, "look_at", check)
    return seen


def test_files_are_looked_at_once(folder: Path, looks: list[Path], cache: Path) -> None:
    first = load_dataset(folder, "train", 8)
    assert sorted(looks) == sorted(folder.rglob("*.bmp"))
    again, val = load_dataset(folder, "train", 8), load_dataset(folder, "val", 8)
    assert len(looks) == 8 and len(first) + len(val) == 8
    assert again.fingerprint() == first.fingerprint() and again[2][0].equal(first[2][0])
    assert [path.suffix for path in cache.iterdir() if path.suffix != ".lock"] == [".npz"]


@pytest.mark.parametrize("change", ["add", "remove", "rename", "rewrite", "class"])
def test_a_changed_folder_is_looked_at_again(folder: Path, looks: list[Path], change: str) -> None:
    before = load_dataset(folder, "train", 8).fingerprint()
    path = folder / "class0" / "0.bmp"
    if change == "add":
        Image.new("RGB", (9, 9), "red").save(folder / "class1" / "new.bmp")
    elif change == "remove":
        path.unlink()
    elif change == "rename":
        path.rename(path.with_name("other.bmp"))
    elif change == "rewrite":
        Image.new("RGB", (9, 9), "red").save(path)  # of the same size
    else:
        (folder / "class1").rename(folder / "class2")
    after = load_dataset(folder, "train", 8)
    assert len(looks) > 8 and (after.fingerprint() != before or path not in after.paths)  # type: ignore[attr-defined]


def test_a_folder_that_was_just_written_is_not_trusted(folder: Path, looks: list[Path]) -> None:
    now = time.time()
    os.utime(folder / "class0" / "0.bmp", (now, now))
    load_dataset(folder, "train", 8)
    load_dataset(folder, "train", 8)
    assert len(looks) == 16


def test_a_change_that_no_stamp_shows_is_refused_when_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_folder, "STAMPED", 1)
    load_dataset(folder, "train", 8)
    last = folder / "class1" / "7.bmp"
    os.utime(last)  # touched, but the same
    data = load_dataset(folder, "train", 8)
    row = data.paths.index(last)  # type: ignore[attr-defined]
    data[row]
    Image.new("RGB", (9, 9), "red").save(last)
    os.utime(last.parent, (1e9, 1e9))
    with pytest.raises(
        DataError, match=r"7\.bmp has changed since it was indexed: touch .*class1 and start again"
    ):
        load_dataset(folder, "train", 8)[row]
    os.utime(last.parent)
    load_dataset(folder, "train", 8)[row]


@pytest.mark.parametrize("harm", ["cut", "text", "empty"])
def test_a_broken_index_is_made_again(folder: Path, looks: list[Path], cache: Path, harm: str) -> None:
    load_dataset(folder, "train", 8)
    (path,) = cache.glob("*.npz")
    path.write_bytes({"cut": path.read_bytes()[:-100], "text": b"no index", "empty": b""}[harm])
    load_dataset(folder, "train", 8)
    load_dataset(folder, "train", 8)
    assert len(looks) == 16


def test_one_of_many_makes_the_index(folder: Path, looks: list[Path]) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_dataset(folder, "train", 8).fingerprint(), range(4)))
    assert len(looks) == 8 and len(set(found)) == 1


def test_what_another_process_made_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Entry("n", 0, (0, 0), Look(1, bytes(16), True))

    @contextmanager
    def waited(lock: str) -> Iterator[None]:
        Index.of(Found(["theirs"], [entry], [tmp_path])).save(Path(lock.removesuffix(".lock")))
        yield

    monkeypatch.setattr(index, "FileLock", waited)
    for moment in (1e9, time.time()):  # even where it could not be trusted later
        os.utime(tmp_path, (moment, moment))
        assert list(open_index(str(moment), pytest.fail).classes) == ["theirs"]


def test_without_a_place_for_it_no_index_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VAR_EXT_CACHE", str(tmp_path / "file"))
    assert load_dataset(folder, "train", 8)[0][0].shape == (3, 8, 8)
    assert "VAR_EXT_CACHE must name a folder" in caplog.text


def test_names_keep_all_bytes() -> None:
    names = ["a/b", "", os.fsdecode(b"\xff\xfe"), "é"]
    packed = Names.of(names)
    assert list(packed) == names and packed[-1] == "é" and packed[1:3] == names[1:3] and len(packed) == 4
    with pytest.raises(IndexError):
        packed[4]


def test_an_index_comes_back_as_it_was(tmp_path: Path) -> None:
    looks = [Look(size=i, digest=bytes([i]) * 16, plain=i % 2 == 0) for i in range(5)]
    entries = [Entry(f"n{i}", i % 2, (i, 7), look) for i, look in enumerate(looks)]
    made = Index.of(Found(["a", "b"], entries, [tmp_path]))
    made.save(tmp_path / "x.npz")
    back = Index.load(tmp_path / "x.npz")
    assert back is not None and list(back.names) == list(made.names) and list(back.classes) == ["a", "b"]
    for name in ("labels", "sizes", "digests", "places", "plain", "stamped", "made"):
        assert np.array_equal(getattr(back, name), getattr(made, name))


def test_a_place_is_part_of_the_key(tmp_path: Path) -> None:
    entry = Entry("n", 0, (0, 0), Look(1, bytes(16), True))
    for key in ("a", "b"):
        open_index(key, lambda: Found([key], [entry], []))  # noqa: B023  called at once
    assert [list(open_index(key, pytest.fail).classes) for key in ("a", "b")] == [["a"], ["b"]]
