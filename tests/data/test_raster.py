"""Pictures from strangers: raster formats alone, a bound on pixels, and thin ones are cut before they are resized."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

import var_ext
from tests.data.pictures import PNG_START, chunk
from var_ext.data import DataError
from var_ext.data.framing import DECODES, GEOMETRIES, LONGEST, resized_pixels, shortened
from var_ext.data.pictures import load_picture
from var_ext.data.raster import FORMATS, MOST_PIXELS, VARIABLE, open_raster
from var_ext.data.reading import check_picture, read_picture, read_published, read_rgb
from var_ext.evaluation.image_sources import adm_crop

READERS = (read_picture, read_rgb, read_published, check_picture)


def header(width: int, height: int) -> bytes:
    """A PNG of 16-bit RGBA that says it has this size, and holds nothing."""
    told = struct.pack(">IIBBBBB", width, height, 16, 6, 0, 0, 0)
    return PNG_START + chunk(b"IHDR", told) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND")


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("size", [(8001, 8000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)], ids=str)
def test_a_picture_of_too_many_pixels_is_refused_by_its_header(
    tmp_path: Path, read: type, size: tuple[int, int]
) -> None:
    assert size[0] * size[1] > MOST_PIXELS
    (tmp_path / "a.png").write_bytes(header(*size))
    with pytest.raises(DataError, match=rf"a\.png: at most 64000000 pixels .* or set {VARIABLE}"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("read", READERS)
def test_the_bound_is_set_by_a_variable(tmp_path: Path, read: type, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    monkeypatch.setenv(VARIABLE, "199")
    with pytest.raises(DataError, match="at most 199 pixels are decoded, it has 20 x 10"):
        read(tmp_path / "a.png")
    monkeypatch.setenv(VARIABLE, "200")
    read(tmp_path / "a.png")
    for wrong in ("0", "-1", "many", "1e9", ""):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(DataError, match=f"{VARIABLE} must be a whole number of pixels"):
            read(tmp_path / "a.png")


def test_a_raised_bound_raises_pillows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    image = io.BytesIO()
    Image.new("L", (20, 10)).save(image, "PNG")
    with pytest.raises(ValueError, match=f"exceeds limit of 100 pixels.*set {VARIABLE}"):
        open_raster(io.BytesIO(image.getvalue()))
    monkeypatch.setenv(VARIABLE, "200")
    assert open_raster(io.BytesIO(image.getvalue())).size == (20, 10)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_postscript_starts_nothing_whatever_its_name(
    tmp_path: Path, read: type, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **more: started.append(args))
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(DataError, match=f"it is none of {', '.join(FORMATS)}"):
        read(path)
    assert not started


@pytest.mark.parametrize("kind", ["ICO", "TGA", "PCX", "SGI", "DDS", "JPEG2000", "EPS"])
def test_other_formats_are_refused(tmp_path: Path, kind: str) -> None:
    content = io.BytesIO()
    try:
        Image.new("RGB", (16, 16)).save(content, kind)
    except OSError:
        pytest.skip(f"this Pillow writes no {kind}")
    (tmp_path / "a.png").write_bytes(content.getvalue())
    with pytest.raises(DataError, match="it is none of PNG"):
        read_rgb(tmp_path / "a.png")


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_each_raster_format_is_read(tmp_path: Path, kind: str) -> None:
    content = io.BytesIO()
    Image.new("RGB", (16, 12), (255, 255, 255)).save(content, kind)
    (tmp_path / "a").write_bytes(content.getvalue())
    for read in (read_rgb, read_published):
        assert np.asarray(read(tmp_path / "a")).min() >= 250 and read(tmp_path / "a").size == (16, 12)


def test_pictures_are_opened_in_one_place() -> None:
    root = Path(var_ext.__file__).parent
    opening = {
        path.name
        for path in root.rglob("*.py")
        if re.search(r"Image\.open\(|imread|PIL\.Image", path.read_text())
    }
    assert opening == {"raster.py"}


# ------------------------------------------------------------------------- thin

THIN = [(60_000, 1), (1, 60_000), (40_001, 2), (3, 30_000)]


@pytest.fixture
def resized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pixels of whatever Pillow resizes."""
    seen: list[int] = []
    plain = Image.Image.resize

    def resize(image: Image.Image, size: tuple[int, int], *args: object, **more: object) -> Image.Image:
        seen.append(size[0] * size[1])
        assert seen[-1] < 2_000_000, "the picture is to be cut first"
        return plain(image, size, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", resize)
    return seen


@pytest.mark.parametrize("size", THIN, ids=str)
def test_a_thin_picture_is_cut_before_it_is_resized(
    tmp_path: Path, size: tuple[int, int], resized: list[int]
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", size, (7, 8, 9)).save(path)
    picture, mask = load_picture(path, 256, path)
    assert picture.shape == (3, 256, 256) and mask is not None and not mask.any()
    assert adm_crop(read_rgb(path), 256).size == (256, 256)
    for geometry in GEOMETRIES:
        for decode in DECODES:
            pixels = resized_pixels(path, 256, geometry, decode)
            assert min(pixels.shape[1:]) == 288 and max(pixels.shape[1:]) <= 288 * (LONGEST + 1)
    assert torch.equal(picture[:, 0, 0], torch.tensor([7, 8, 9]) / 255) and resized


@pytest.mark.parametrize("size", [*THIN, (33, 2), (35, 2), (17, 1)], ids=str)
def test_the_middle_of_a_thin_picture_is_where_it_was(size: tuple[int, int]) -> None:
    long = max(size)
    places = np.arange(long, dtype=np.int32).reshape((1, -1) if size[0] == long else (-1, 1))
    places = np.broadcast_to(places, size[::-1])
    kept = np.asarray(shortened(Image.fromarray(np.ascontiguousarray(places))))
    assert (kept.min() + kept.max()) / 2 == (long - 1) / 2
    assert LONGEST * min(size) <= max(kept.shape) <= LONGEST * min(size) + 1
    assert min(kept.shape) == min(size)


def test_other_pictures_are_not_cut() -> None:
    for size in ((LONGEST, 1), (3, 3 * LONGEST), (500, 375)):
        image = Image.new("RGB", size)
        assert shortened(image) is image
