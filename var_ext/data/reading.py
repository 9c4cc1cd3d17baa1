"""Reads a picture file as a viewer shows it, whatever its metadata and bit depth.

Bad metadata is never an error: an unreadable orientation is ignored, and chunks that do not affect pixels are dropped
if Pillow fails on them.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image

from var_ext.data.dataset import DataError
from var_ext.paths import user_path

# EXIF orientation -> the transform that makes the picture upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pixel modes whose values need no check.
PLAIN_MODES = frozenset(("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"))
ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
TAIL = 32  # last bytes of a file, searched for its end marker

PNG_START, JPEG_START = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")  # the last holds the orientation


def read_picture(path: Path) -> Image.Image:
    """An upright picture with 8 bits per channel: RGBA if it has transparency, else RGB.

    Gray of 16 or 32 bits and floats are scaled, see `_eight_bits`.

    Raises:
        DataError: not an image, broken, or gray values of unknown scale.
    """
    return _opened(path, _upright)


def read_rgb(path: Path) -> Image.Image:
    """As `read_picture`, transparent parts on white."""
    image = read_picture(path)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def check_picture(path: Path) -> None:
    """Raises the DataError that reading a picture later would raise.

    Files with a plain header and an end marker are not decoded, so damage inside their pixel data is found only later.
    """

    def looks_whole(image: Image.Image) -> bool:
        return image.mode in PLAIN_MODES and _has_end(path, image.format)

    if not _opened(path, looks_whole):
        read_picture(path)


def _opened(path: Path, use: Callable[[Image.Image], Any]) -> Any:
    """The result of `use` on a file's image, of which only the header has been read."""
    path = user_path(path)
    try:
        with open(path, "rb") as handle:
            try:
                return _used(handle, use)
            except Exception:
                handle.seek(0)
                bare = _without_metadata(handle.read())
                if bare is None:
                    raise
                return _used(io.BytesIO(bare), use)
    # Pillow raises many classes for broken files, from OSError to SyntaxError and struct.error.
    except Exception as error:
        raise DataError(f"wanted a readable image, got {path}: {error}") from error


def _used(handle: BinaryIO, use: Callable[[Image.Image], Any]) -> Any:
    # never by name: Pillow 13 memory-maps uncompressed TIFFs and then garbles those it rotates
    with Image.open(handle) as image:
        return use(image)


def _without_metadata(data: bytes) -> bytes | None:
    """A PNG or JPEG reduced to what its pixels need, or None for another format."""
    if data.startswith(PNG_START):
        kept, at = [PNG_START], len(PNG_START)
        while at + 8 <= len(data):
            end = at + 12 + int.from_bytes(data[at : at + 4], "big")
            kept += [data[at:end]] if data[at + 4 : at + 8] in PNG_PIXELS else []
            at = end
        return b"".join(kept)
    if data.startswith(JPEG_START):
        kept, at = [JPEG_START], len(JPEG_START)
        while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            # APP0 to APP15 and comments; APP1 holds the orientation
            metadata = 0xE0 <= data[at + 1] <= 0xEF or data[at + 1] == 0xFE
            kept += [data[at:end]] if not metadata or data[at + 1] == 0xE1 else []
            at = end
        return b"".join([*kept, data[at:]])
    return None


def _has_end(path: Path, format: str | None) -> bool:
    """Whether the file has its end marker."""
    with open(user_path(path), "rb") as handle:
        start = handle.read(8)
        size = handle.seek(0, io.SEEK_END)
        handle.seek(max(0, size - TAIL))
        tail = handle.read()
    if format == "WEBP":
        return 8 + int.from_bytes(start[4:], "little") <= size
    return format in ENDS and ENDS[format] in tail


def _upright(file: Image.Image) -> Image.Image:
    file.load()
    turn = _turn(file)
    image = _eight_bits(file)
    image = image if turn is None else image.transpose(turn)
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 or 32 bits or of floats as 8 bits; other pictures as they are.

    PNGs, PGMs and 16-bit TIFFs define white. Other gray counts as 0..1 if its largest value is at most 1, as 0..255
    (floats: of at least 16) or, for integers, as 0..65535.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode != "F" and (image.mode != "I" or image.format in ("PNG", "PPM")):
        white = 65535
    else:
        whites = (1, 255, 65535) if image.mode == "I" else (1, 255)
        white = next((white for white in whites if high <= white), 0)
    between = image.mode == "F" and 1 < high < 16  # rather highlights over 1 than a nearly black picture
    if not (low >= 0 and high <= white) or between:
        wanted = "gray values in 0..1, 0..255 or, of integers, 0..65535"
        raise ValueError(f"{wanted} are wanted, it has {low} to {high}: scale or clip them")
    gray = Image.fromarray((values / (white / 255)).round().astype(np.uint8))
    if "transparency" in image.info:
        gray.putalpha(
            Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
        )
    return gray
