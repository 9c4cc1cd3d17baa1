"""A picture and its mask at a model's size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.pictures import chunk, png
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


def strokes(mode: str, opaque: Any, clear: Any = 0) -> Image.Image:
    """One colour in the upper left quarter of 8 x 8 pixels, all else transparent over `clear`."""
    gray = Image.new("L", (8, 8), clear)
    gray.paste(opaque, (0, 0, 4, 4))
    if mode == "P":
        image = gray.point(lambda value: value == opaque).convert("P")
        image.putpalette([clear] * 3 + [opaque] * 3)
        image.info["transparency"] = 0
        return image
    alpha = Image.new("L", (8, 8), 0)
    alpha.paste(255, (0, 0, 4, 4))
    return Image.merge("LA", (gray, alpha)).convert(mode)


@pytest.fixture
def masked(tmp_path: Path) -> Callable[[Image.Image | bytes], torch.Tensor]:
    """What a mask of 8 x 8 pixels covers."""

    def load(mask: Image.Image | bytes) -> torch.Tensor:
        path = tmp_path / "mask.png"
        path.write_bytes(mask) if isinstance(mask, bytes) else mask.save(path)
        found = load_picture(write(tmp_path / "a.png", np.zeros((8, 8))), 8, path)[1]
        assert found is not None
        return found

    return load


QUARTER = torch.zeros(8, 8, dtype=torch.bool)
QUARTER[:4, :4] = True
Masked = Callable[[Image.Image | bytes], torch.Tensor]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("clear", [0, 255])
def test_white_strokes_on_a_transparent_layer(masked: Masked, mode: str, clear: int) -> None:
    if mode != "P" or not clear:  # a palette has one white
        assert torch.equal(masked(strokes(mode, 255, clear)), QUARTER)


@pytest.mark.parametrize(("kind", "channels"), [(4, 2), (6, 4)])
def test_white_strokes_of_sixteen_bits(masked: Masked, kind: int, channels: int) -> None:
    pixels = np.where(QUARTER, 65535, 0).astype(np.uint16)[..., None].repeat(channels, -1)
    assert torch.equal(masked(png(pixels, kind=kind)), QUARTER)
    # one gray value is transparent
    assert torch.equal(masked(png(pixels[..., 0].copy(), chunk(b"tRNS", bytes(2)))), QUARTER)


def test_a_feathered_stroke_counts_from_the_middle_of_its_edge(masked: Masked) -> None:
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:] = np.linspace(0, 255, 8).astype(np.uint8)
    mask = Image.merge("LA", (Image.new("L", (8, 8), 255), Image.fromarray(alpha)))
    assert torch.equal(masked(mask), torch.arange(8).expand(8, 8) >= 4)


def test_alpha_without_a_hole_changes_nothing(masked: Masked) -> None:
    mask = Image.fromarray((QUARTER.numpy() * 200).astype(np.uint8)).convert("RGBA")
    assert torch.equal(masked(mask), QUARTER)


def test_black_and_white_on_a_transparent_layer(masked: Masked) -> None:
    mask = strokes("RGBA", 255)
    mask.paste((0, 0, 0, 255), (4, 4, 8, 8))
    assert torch.equal(masked(mask), QUARTER)


@pytest.mark.parametrize("opaque", ["black", "red", "photograph", "faint"])
def test_a_mask_that_may_mean_either_is_refused(
    masked: Masked, rng: np.random.Generator, opaque: str
) -> None:
    mask = strokes("RGBA", 0)
    if opaque == "red":
        mask.paste((255, 0, 0, 255), (0, 0, 4, 4))
    if opaque == "photograph":  # with a hole where it is to be drawn anew
        mask = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).convert("RGBA")
        mask.paste((0, 0, 0, 0), (0, 0, 4, 4))
    if opaque == "faint":
        mask.paste((255, 255, 255, 100), (0, 0, 4, 4))
    message = "transparent parts, which are kept, but .*: paint white what is to be replaced .* without transparency"
    with pytest.raises(DataError, match=message):
        masked(mask)


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
