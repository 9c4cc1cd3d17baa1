"""Folders of class folders: layouts, crops, and an error with the reason for each way to be wrong."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.pictures import exif
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


@pytest.mark.parametrize(
    "suffix", [".png", ".jpg", ".JPEG", ".webp", ".bmp", ".tif", ".TIFF", ".ppm", ".jfif"]
)
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


def test_the_fingerprint_knows_content_but_no_place_and_no_time(tmp_path: Path) -> None:
    for i in range(3):
        draw(tmp_path / "here" / "a" / f"{i}.bmp", seed=i)
    before = load_dataset(tmp_path / "here", "train", 8).fingerprint()
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copyfile)
    os.utime(tmp_path / "there" / "a" / "0.bmp", (1, 1))
    assert load_dataset(tmp_path / "there", "train", 8).fingerprint() == before
    for i in range(3):
        draw(tmp_path / "there" / "a" / f"{i}.bmp", seed=i + 1)  # of the same size
    assert load_dataset(tmp_path / "there", "train", 8).fingerprint() != before


def test_a_file_that_is_no_image_shows_before_training(flat: Path) -> None:
    for path in (flat / "cat").iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"wanted a readable image, got .*cat.*\.png"):
        load_dataset(flat, "train", 8).fingerprint()


def shown(path: Path, image: Image.Image, **options: Any) -> torch.Tensor:
    """A picture as a viewer shows it, in 0..255, (S, S, 3)."""
    path.mkdir()
    for i in range(2):
        image.save(path / f"{i}.png", **options)
    pixels = load_dataset(path.parent, "train", 16, geometry="upright")[0][0]
    return ((pixels + 1) * 127.5).permute(1, 2, 0)


def test_damaged_exif_does_not_end_a_training(flat: Path) -> None:
    """The case: a turn beside a resolution of -1/0."""
    for path in (flat / "cat").iterdir():
        Image.new("RGB", (12, 9)).save(path.with_suffix(".jpg"), exif=exif(6, numerator=-1, denominator=0))
        path.unlink()
    data = load_dataset(flat, "train", 8)
    data.fingerprint()
    assert len([data[i] for i in range(len(data))]) == 18


@pytest.mark.parametrize("harm", ["cut", "scale"])
def test_what_a_picture_fails_at_shows_before_training(flat: Path, harm: str) -> None:
    path = load_dataset(flat, "train", 8).paths[3]  # type: ignore[attr-defined]
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        Image.fromarray(np.full((9, 9), -1, np.int32)).save(path, format="TIFF")
    with pytest.raises(DataError, match=re.escape(f"wanted a readable image, got {path}: ")):
        load_dataset(flat, "train", 8).fingerprint()


def test_names_that_are_not_utf8(flat: Path) -> None:
    """As old archives have them: Latin-1 names of a root, a class and its files."""
    root = flat.rename(flat.parent / os.fsdecode(b"caf\xe9"))
    (root / "cat").rename(root / os.fsdecode(b"b\xe4r"))
    for path in list((root / "dog").iterdir()):
        path.rename(path.with_name(os.fsdecode(b"\xfc") + path.name))
    train, val = load_dataset(root, "train", 8), load_dataset(root, "val", 8)
    assert (len(train), len(val)) == (18, 2) and train[17][0].shape == (3, 8, 8)
    assert train.fingerprint() != val.fingerprint()
    assert train.class_names == [r"b\xe4r", "dog"]  # text that can be stored, printed and drawn


def test_exif_turns_the_image(tmp_path: Path) -> None:
    image = Image.new("L", (18, 18))
    image.paste(255, (0, 0, 18, 9))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    found = shown(tmp_path / "a", image, exif=exif)
    assert (found[:, 9:] == 255).all() and (found[:, :7] == 0).all()


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    image = Image.fromarray(np.full((18, 18), 100 * 257, dtype=np.uint16))
    assert (shown(tmp_path / "a", image) == 100).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (18, 18), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 18, 9))
    if mode == "P":
        image = Image.new("P", (18, 18), 1)
        image.paste(0, (0, 0, 18, 9))
        image.putpalette([0] * 6)
        found = shown(tmp_path / "a", image, transparency=1)
    else:
        found = shown(tmp_path / "a", image.convert(mode))
    assert (found[:7] == 0).all() and (found[9:] == 255).all()


def test_an_image_with_damaged_pixels_is_named_when_it_is_read(flat: Path) -> None:
    for path in (flat / "cat").iterdir():
        content = bytearray(path.read_bytes())
        content[60:-60] = bytes(len(content) - 120)
        path.write_bytes(content)
    data = load_dataset(flat, "train", 8)
    with pytest.raises(DataError, match=r"wanted a readable image, got .*cat.*\.png"):
        data[0]


def test_all_broken_images_are_named_at_once(flat: Path) -> None:
    for i in range(9):
        (flat / "dog" / f"{i}.png").write_text("not an image")
    with pytest.raises(
        DataError, match=r"got .*/dog/0\.png: .*; 8 more are broken: dog/1\.png, .*7\.png, \.\.\.$"
    ):
        load_dataset(flat, "train", 8)


def test_home_is_found(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(flat.parent))
    assert len(load_dataset(f"~/{flat.name}", "train", 8)) == 18


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'digits', .* or a folder.*nowhere, which does not exist"):
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
    with pytest.raises(DataError, match=r"images beside no class folder: a\.png and 0 more"):
        load_dataset(tmp_path, "train", 8)


def test_images_beside_class_folders(flat: Path) -> None:
    draw(flat / "stray.png")
    with pytest.raises(DataError, match=r"images beside the class folders: stray\.png"):
        load_dataset(flat, "train", 8)


def test_images_beside_split_folders(split: Path) -> None:
    draw(split / "stray.png")
    with pytest.raises(DataError, match=r"images beside the split folders: stray\.png"):
        load_dataset(split, "train", 8)


def test_folders_inside_a_class(flat: Path) -> None:
    draw(flat / "cat" / "more" / "0.png")
    with pytest.raises(DataError, match=r"1 folders inside the class folders, such as .*more"):
        load_dataset(flat, "train", 8)


def test_ignored_files_are_reported(flat: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("scan.psd", "other.psd", "LICENSE", ".hidden"):
        (flat / "cat" / name).write_bytes(b"")
    assert len(load_dataset(flat, "train", 8)) == 18
    assert "ignoring 3 files in" in caplog.text and caplog.text.strip().endswith(": .psd, LICENSE")


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
    with pytest.raises(DataError, match="a folder of cat, dog, got one part, which has no test split"):
        load_dataset(flat, "test", 8)


def test_a_class_that_training_does_not_know(split: Path) -> None:
    draw(split / "val" / "emu" / "0.png")
    with pytest.raises(DataError, match="got emu besides"):
        load_dataset(split, "val", 8)
