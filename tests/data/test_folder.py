"""Folders of class folders: layouts, crops, and an error with the reason for each way to be wrong."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from var_ext.data import DataError, load_dataset


def draw(path: Path, size: tuple[int, int] = (20, 16), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """ROOT/CLASS/*: two classes of ten images."""
    for name in ("cat", "dog"):
        for i in range(10):
            draw(tmp_path / name / f"{i}.png", seed=i)
    return tmp_path


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """ROOT/{train,val}/CLASS/*."""
    for part, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                draw(tmp_path / part / name / f"{i}.png", seed=i)
    return tmp_path


def test_a_flat_folder_is_split_by_names_alone(flat: Path) -> None:
    train, val = load_dataset(flat, "train", 8), load_dataset(flat, "val", 8)
    assert (len(train), len(val)) == (18, 2) and train.class_names == ["cat", "dog"]
    assert val.labels.tolist() == [0, 1] and train.labels.bincount().tolist() == [9, 9]
    names = {path.relative_to(flat) for path in [*train.paths, *val.paths]}  # type: ignore[attr-defined]
    assert len(names) == 20
    moved = flat.rename(flat.parent / "elsewhere")
    again = load_dataset(moved, "val", 8)
    assert [p.relative_to(moved) for p in again.paths] == [p.relative_to(flat) for p in val.paths]  # type: ignore[attr-defined]


def test_split_folders_are_used_as_they_are(split: Path) -> None:
    assert len(load_dataset(split, "train", 8)) == 6
    assert load_dataset(split, "val", 8).labels.tolist() == [0, 0, 1, 1]


def test_labels_do_not_shift_where_a_split_lacks_a_class(split: Path) -> None:
    shutil.rmtree(split / "val" / "cat")
    val = load_dataset(split, "val", 8)
    assert val.class_names == ["cat", "dog"] and val.labels.tolist() == [1, 1]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp", ".bmp"])
@pytest.mark.parametrize("size", [(20, 16), (9, 33), (8, 8)])
def test_every_format_and_shape_becomes_a_square(tmp_path: Path, suffix: str, size: tuple[int, int]) -> None:
    for i in range(2):
        draw(tmp_path / "a" / f"{i}{suffix}", size)
    image, label = load_dataset(tmp_path, "train", 16, augment=1)[0]
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32 and label == 0
    assert image.min() >= -1 and image.max() <= 1


def test_the_crop_is_central_in_validation_and_random_in_training(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(90, dtype=np.uint8)[None, :, None], (36, 90, 3))
    for i in range(12):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "a" / f"{i}.png")
    centre = load_dataset(tmp_path, "val", 32)[0][0]
    # shorter side 36 = 1.125 * 32, so nothing is resized: columns 29..60 of the ramp
    assert torch.equal(((centre[0, 0] + 1) * 127.5).round(), torch.arange(29.0, 61.0))
    train = load_dataset(tmp_path, "train", 32, augment=1, seed=1)
    starts = {float(train[i][0][0, 0, 0]) for i in range(len(train))}
    assert len(starts) > 3
    assert torch.equal(train.with_epoch(2)[3][0], train.with_epoch(2)[3][0])
    assert len({float(train.with_epoch(e)[3][0][0, 0, 0]) for e in range(8)}) > 3


def test_the_fingerprint_follows_content_augmentation_and_seed(flat: Path) -> None:
    before = load_dataset(flat, "train", 8).fingerprint()
    assert load_dataset(flat, "train", 8).fingerprint() == before
    assert load_dataset(flat, "train", 8).with_epoch(3).fingerprint() == before
    others = [load_dataset(flat, "train", 9), load_dataset(flat, "train", 8, augment=1)]
    others.append(load_dataset(flat, "train", 8, seed=1))
    draw(load_dataset(flat, "train", 8).paths[0], (21, 17), seed=99)  # type: ignore[attr-defined]
    others.append(load_dataset(flat, "train", 8))
    assert len({before, *(other.fingerprint() for other in others)}) == 5


def test_a_broken_image_is_named(flat: Path) -> None:
    for path in (flat / "cat").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    data = load_dataset(flat, "train", 8)
    with pytest.raises(DataError, match=r"wanted a readable image, got .*cat.*\.png"):
        data[0]


def test_text_that_calls_itself_an_image_is_named(flat: Path) -> None:
    (flat / "dog" / "0.png").write_text("not an image")
    data = load_dataset(flat, "train", 8)
    with pytest.raises(DataError, match=r"dog.*\.png"):
        [data[i] for i in range(len(data))]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'digits' or a folder.*nowhere, which does not exist"):
        load_dataset(tmp_path / "nowhere", "train", 8)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(DataError, match="which is not a folder"):
        load_dataset(tmp_path / "x.zip", "train", 8)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="which has no class folder"):
        load_dataset(tmp_path, "train", 8)


def test_images_without_class_folders(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    with pytest.raises(DataError, match="1 images and no class folder"):
        load_dataset(tmp_path, "train", 8)


def test_images_beside_class_folders(flat: Path) -> None:
    draw(flat / "stray.png")
    with pytest.raises(DataError, match=r"images beside the class folders: stray\.png"):
        load_dataset(flat, "train", 8)


def test_a_class_without_images(flat: Path) -> None:
    (flat / "emu").mkdir()
    (flat / "emu" / "notes.txt").write_text("none yet")
    with pytest.raises(DataError, match="no image: emu"):
        load_dataset(flat, "train", 8)


def test_one_image_cannot_be_split(tmp_path: Path) -> None:
    draw(tmp_path / "a" / "only.png")
    with pytest.raises(DataError, match="one class with two images"):
        load_dataset(tmp_path, "val", 8)


def test_a_split_folder_that_is_not_there(split: Path) -> None:
    with pytest.raises(DataError, match=r"train and test in .*, got train, val"):
        load_dataset(split, "test", 8)


def test_a_flat_folder_has_no_test_split(flat: Path) -> None:
    with pytest.raises(DataError, match="got cat, dog: no test split"):
        load_dataset(flat, "test", 8)


def test_a_class_that_training_does_not_know(split: Path) -> None:
    draw(split / "val" / "emu" / "0.png")
    with pytest.raises(DataError, match="got emu besides"):
        load_dataset(split, "val", 8)
