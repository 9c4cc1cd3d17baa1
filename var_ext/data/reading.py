"""Reads a picture file as a viewer shows it, whatever its metadata and bit depth, or as the published code does.

Bad metadata is never an error: an unreadable orientation is ignored, and chunks that do not affect pixels are dropped
if Pillow fails on them. A file is a path, or an open binary handle with a `name` for messages.
"""

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image

from var_ext.data.dataset import DataError
from var_ext.data.raster import open_raster
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
ROWS = 256  # of deep gray, scaled at once: in float64
TAIL = 32  # last bytes of a file, searched for its end marker
HEAD = 4096  # first bytes of a file, which with its size tell it from others

PNG_START, JPEG_START = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")  # the last holds the orientation


File = Path | BinaryIO


class Bytes(io.BytesIO):
    """A file in memory, with the name that messages give it."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


@dataclass(frozen=True, slots=True)
class Look:
    """What a first look at a picture file tells.

    Attributes:
        size: in bytes.
        digest: 16 bytes, of the first `HEAD` bytes.
        plain: whether `read_rgb` and `read_published` give the same pixels.
    """

    size: int
    digest: bytes
    plain: bool


def read_picture(file: File, least: int = 0) -> Image.Image:
    """An upright picture with 8 bits per channel: RGBA if it has transparency, else RGB.

    Gray of 16 or 32 bits and floats are scaled, see `_eight_bits`. With `least`, a JPEG may be decoded at a half, a
    quarter or an eighth of its size, as long as no side gets shorter than `least` pixels.

    Raises:
        DataError: not an image, broken, of too many pixels (`raster.most_pixels`), or gray values of unknown scale.
    """
    with _reading(file) as handle:
        return _used(handle, lambda image: _upright(image, least))


def read_rgb(file: File, least: int = 0) -> Image.Image:
    """As `read_picture`, transparent parts on white."""
    image = read_picture(file, least)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_published(file: File, least: int = 0) -> Image.Image:
    """RGB as in the published code, which is Pillow's `convert("RGB")`: no turn, transparency dropped, deep gray cut.

    `least` as in `read_picture`. Raises DataError for what is not an image, broken, or of too many pixels.
    """

    def converted(image: Image.Image) -> Image.Image:
        _scaled(image, least)
        return image.convert("RGB")

    with _reading(file) as handle:
        return _used(handle, converted)


def check_picture(file: File) -> Look:
    """Raises the DataError that reading a picture later would raise; else tells what was seen.

    Files with a plain header and an end marker are not decoded, so damage inside their pixel data is found only later.
    """

    with _reading(file) as handle:

        def seen(image: Image.Image) -> bool:
            if image.mode not in PLAIN_MODES or not _has_end(handle, image.format):
                _upright(image)
            return image.mode[0] not in "IF" and not image.has_transparency_data and _turn(image) is None

        plain = _used(handle, seen)
        handle.seek(0)
        return Look(digest=head_digest(handle), size=handle.seek(0, io.SEEK_END), plain=plain)


def look_at(file: File) -> Look | DataError:
    """What `check_picture` tells or raises."""
    try:
        return check_picture(file)
    except DataError as error:
        return error


def head_digest(handle: BinaryIO) -> bytes:
    """16 bytes, of the next `HEAD` bytes."""
    return hashlib.blake2b(handle.read(HEAD), digest_size=16).digest()


@contextmanager
def _reading(file: File) -> Iterator[BinaryIO]:
    """The open file; whatever fails inside the block becomes a DataError that names it."""
    name = user_path(file) if isinstance(file, Path) else file.name
    try:
        with open(name, "rb") if isinstance(file, Path) else nullcontext(file) as handle:
            yield handle
    # Pillow raises many classes for broken files, from OSError to SyntaxError and struct.error.
    except Exception as error:
        raise DataError(f"wanted a readable image, got {name}: {error}") from error


def _used(handle: BinaryIO, use: Callable[[Image.Image], Any]) -> Any:
    """The result of `use` on a file's image, of which only the header has been read."""

    def tried(handle: BinaryIO) -> Any:
        with open_raster(handle) as image:
            return use(image)

    try:
        return tried(handle)
    except Exception:
        handle.seek(0)
        bare = _without_metadata(handle.read())
        if bare is None:
            raise
        return tried(io.BytesIO(bare))


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


def _has_end(handle: BinaryIO, format: str | None) -> bool:
    """Whether the file has its end marker. The handle is left where it was."""
    at = handle.tell()
    handle.seek(0)
    start = handle.read(8)
    size = handle.seek(0, io.SEEK_END)
    handle.seek(max(0, size - TAIL))
    tail = handle.read()
    handle.seek(at)
    if format == "WEBP":
        return 8 + int.from_bytes(start[4:], "little") <= size
    return format in ENDS and ENDS[format] in tail


def _scaled(image: Image.Image, least: int) -> None:
    if least:
        image.draft(None, (least, least))  # of JPEGs; other formats ignore it


def _upright(file: Image.Image, least: int = 0) -> Image.Image:
    _scaled(file, least)
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
    scaled = np.empty(values.shape, np.uint8)
    for some in range(0, len(values), ROWS):
        scaled[some : some + ROWS] = (values[some : some + ROWS] / (white / 255)).round()
    gray = Image.fromarray(scaled)
    if "transparency" in image.info:
        gray.putalpha(
            Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
        )
    return gray
