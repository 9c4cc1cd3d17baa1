"""The only place that opens pictures, which may come from strangers: raster formats alone, and a bound on pixels.

Other formats of Pillow's are never tried: some start a program (PostScript starts Ghostscript), and each is one more
decoder that a file can reach, whatever its name says.
"""

import os
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF")  # MPO, of cameras, is opened as JPEG
MOST_PIXELS = 64_000_000  # 8000 x 8000: with the program at most 1.3 GB of memory, of any format
VARIABLE = "VAR_EXT_MAX_PIXELS"  # raises the bound, or lowers it


def most_pixels() -> int:
    """The bound: `VAR_EXT_MAX_PIXELS`, by default `MOST_PIXELS`. Raises ValueError unless it is a positive number."""
    text = os.environ.get(VARIABLE, str(MOST_PIXELS))
    if not text.isdecimal() or not int(text):
        raise ValueError(f"{VARIABLE} must be a whole number of pixels, at least 1, got {text!r}")
    return int(text)


def open_raster(handle: BinaryIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """A picture of which only the header has been read.

    Never by name: Pillow 13 memory-maps uncompressed TIFFs and then garbles those it rotates.

    Args:
        handle: the file, open at its beginning.
        formats: those that may be opened.

    Raises:
        ValueError: it is of another format, or has more than `most_pixels` pixels.
        Exception: of many classes, where Pillow fails on a broken file.
    """
    most = most_pixels()
    if VARIABLE in os.environ and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(most, Image.MAX_IMAGE_PIXELS)  # Pillow's own bound, of the process
    try:
        image = Image.open(handle, formats=formats)
    except UnidentifiedImageError as error:
        raise ValueError(f"it is none of {', '.join(formats)}, or its header is broken") from error
    except Image.DecompressionBombError as error:
        raise ValueError(_too_many(str(error), most)) from error
    if image.width * image.height > most:
        raise ValueError(_too_many(f"it has {image.width} x {image.height}", most))
    return image


def _too_many(came: str, most: int) -> str:
    return f"at most {most} pixels are decoded, {came}: make it smaller, or set {VARIABLE}"
