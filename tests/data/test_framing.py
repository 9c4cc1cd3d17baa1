"""From a file to a crop: the published arithmetic, worked out by hand, and what the choices change."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from var_ext.data import framing, load_dataset
from var_ext.data.framing import central_crop, resized_pixels, resized_size
from var_ext.data.reading import Bytes

# torchvision: the longer side is int(side * long / short), the crop starts at int(round((side - size) / 2.0)), where
# Python rounds halves to even. (width, height) -> (width, height) for a shorter side of 288, (left, top) of 256.
BY_HAND = {
    (500, 375): ((384, 288), (64, 16)),  # 288 * 500 / 375 = 384
    (375, 500): ((288, 384), (16, 64)),
    (500, 334): ((431, 288), (88, 16)),  # 431.14; 175 / 2 = 87.5 to 88
    (640, 427): ((431, 288), (88, 16)),  # 431.66, cut
    (427, 640): ((288, 431), (16, 88)),
    (500, 399): ((360, 288), (52, 16)),  # 360.90, cut
    (1000, 747): ((385, 288), (64, 16)),  # 385.54, cut; 129 / 2 = 64.5 to 64
    (300, 301): ((288, 288), (16, 16)),  # 288.96, cut
    (333, 500): ((288, 432), (16, 88)),
    (256, 256): ((288, 288), (16, 16)),
}


@pytest.mark.parametrize("size", BY_HAND, ids=str)
def test_sizes_and_crops_are_the_published_ones(size: tuple[int, int]) -> None:
    resized, corner = BY_HAND[size]
    assert resized_size(*size, 288) == resized
    assert central_crop(*resized, 256) == corner


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(500, 334), (1000, 747)], ids=str)
def test_pixels_are_the_published_ones_bit_for_bit(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "a").mkdir()
    for i in range(2):
        noise(*size).save(tmp_path / "a" / f"{i}.jpg")
    found = load_dataset(tmp_path, "val", 256)[0][0]
    resized, (left, top) = BY_HAND[size]
    with Image.open(tmp_path / "a" / "0.jpg") as file:
        image = file.convert("RGB").resize(resized, Image.Resampling.LANCZOS)
    pixels = np.asarray(image)[top : top + 256, left : left + 256]
    # ToTensor, then x + x - 1
    wanted = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float().div(255)
    assert torch.equal(found, wanted.add(wanted).add_(-1))


def lines(width: int, height: int) -> Bytes:
    """A JPEG of lines in all colours on white: hard edges, the worst that pictures have."""
    rng, image = np.random.default_rng(0), Image.new("RGB", (width, height), "white")
    for _ in range(60):
        ends = [tuple(map(int, rng.integers(0, (width, height)))) for _ in range(2)]
        ImageDraw.Draw(image).line(ends, tuple(map(int, rng.integers(0, 256, 3))), int(rng.integers(1, 6)))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=95)
    return Bytes(content.getvalue(), "lines")


@pytest.mark.parametrize("size", [(500, 375), (2000, 1500)], ids=str)
def test_fast_pixels_are_as_near_as_the_docstring_says(size: tuple[int, int]) -> None:
    exact, fast = (resized_pixels(lines(*size), 256, "published", decode) for decode in framing.DECODES)
    off = (exact.int() - fast.int()).abs().float()
    assert exact.dtype == fast.dtype == torch.uint8 and exact.shape == fast.shape
    assert 0.1 < off.mean() < 1.2 and off.max() <= 40  # measured: 0.9 and 29


def test_only_jpegs_of_more_than_twice_the_size_are_decoded_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(
        framing, "_pixels", lambda image: sizes.append(image.size) or torch.zeros(3, 9, 9).byte()
    )
    for size in ((500, 375), (1100, 1100), (1200, 1200), (4000, 3000)):
        resized_pixels(lines(*size), 256, "upright", "fast")
    assert sizes == [(500, 375), (1100, 1100), (600, 600), (1000, 750)]


def test_pictures_that_a_viewer_shows_differently_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    for i in range(8):
        noise(20, 16).save(tmp_path / "a" / f"{i}.png", **({"exif": turned} if i < 5 else {}))
    published, upright = (load_dataset(tmp_path, "train", 16, geometry=each) for each in framing.GEOMETRIES)
    kept = sum(int(path.stem) < 5 for path in upright.paths)  # type: ignore[attr-defined]
    assert caplog.text.count(f"{kept} of 7 pictures") == 1 and "geometry='upright' shows them" in caplog.text
    turned_row = next(i for i, path in enumerate(upright.paths) if int(path.stem) < 5)  # type: ignore[attr-defined]
    assert not torch.equal(published[turned_row][0], upright[turned_row][0])


def test_what_changes_pixels_changes_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i in range(2):
        noise(20, 16).save(tmp_path / "a" / f"{i}.png")
    found = [
        load_dataset(tmp_path, "train", 8, geometry=geometry, decode=decode).fingerprint()
        for geometry in framing.GEOMETRIES
        for decode in framing.DECODES
    ]
    assert len(set(found)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"geometry": "square"}, "geometry must be 'published' or 'upright', got 'square'"),
        ({"decode": "half"}, "decode must be 'exact' or 'fast', got 'half'"),
        ({"decode": "fast"}, "digits has none, got 'published' and 'fast'"),
    ],
)
def test_choices_that_are_not_there(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset("digits", "train", 8, **options)  # type: ignore[arg-type]
