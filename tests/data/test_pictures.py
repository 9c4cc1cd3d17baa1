"""A picture and its mask at a model's size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from var_ext.data import DataError
from var_ext.data.pictures import load_picture


def write(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_a_picture_of_the_models_size_is_unchanged(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (12, 12, 3))
    picture, mask = load_picture(write(tmp_path / "a.png", pixels), 12)
    assert mask is None and picture.dtype == torch.float32
    assert np.array_equal((picture * 255).round().numpy().transpose(1, 2, 0), pixels)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (5, 9), (64, 47), (7, 300)])
def test_the_middle_square_is_taken(tmp_path: Path, shape: tuple[int, int]) -> None:
    height, width = shape
    ramp = np.broadcast_to(np.linspace(0, 255, width)[None, :, None], (height, width, 3))
    picture, _ = load_picture(write(tmp_path / "a.png", ramp), 12)
    assert picture.shape == (3, 12, 12)
    share = min(1, height / width)  # of the ramp, in the middle
    middles = 0.5 + share * ((np.arange(12) + 0.5) / 12 - 0.5)
    assert np.abs(picture[0, 6].numpy() - middles).max() < 0.05


@pytest.mark.parametrize("size", [8, 12, 31, 40])
def test_each_pixel_that_white_reaches_is_masked(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "a.png", np.zeros((31, 31, 3)))
    for y, x in ((0, 0), (30, 30), (13, 4), (15, 15)):
        pixels = np.zeros((31, 31))
        pixels[y, x] = 128
        _, mask = load_picture(path, size, write(tmp_path / "mask.png", pixels))
        assert mask is not None and mask.dtype == torch.bool and mask.shape == (size, size)
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        assert mask.sum() == len(rows) * len(columns) >= 1
        for place, found in ((y, rows), (x, columns)):  # all of them overlap the white pixel
            assert (found + 1 > place * size / 31).all() and (found < (place + 1) * size / 31).all()


def test_gray_below_the_middle_is_not_masked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", np.full((20, 14, 3), 127))
    _, mask = load_picture(path, 7, path)
    assert mask is not None and not mask.any()


def test_bad_files_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    path, other = write(tmp_path / "a.png", np.zeros((8, 9, 3))), write(tmp_path / "b.png", np.zeros((9, 8)))
    (tmp_path / "cut.png").write_bytes(
        write(tmp_path / "c.png", rng.integers(0, 256, (40, 40, 3))).read_bytes()[:999]
    )
    with pytest.raises(DataError, match=r"the mask .*b.png must have the picture's size, 9 x 8, got 8 x 9"):
        load_picture(path, 8, other)
    for missing in ("nothing.png", "cut.png"):
        with pytest.raises(DataError, match=f"wanted a readable image, got .*{missing}"):
            load_picture(tmp_path / missing, 8)
