"""Image files as a viewer shows them, and one picture with its mask at a model's size, for editing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from var_ext.data.dataset import DataError


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The image of a file, of which only the header is read so far."""
    try:
        with Image.open(path) as file:
            yield file
    # Pillow reports broken files by many classes, from OSError to SyntaxError and struct.error.
    except Exception as error:
        raise DataError(f"wanted a readable image, got {path}: {error}") from error


def upright_rgb(file: Image.Image) -> Image.Image:
    """As a viewer shows it: turned as EXIF says, transparent parts on white, 16-bit gray as 8-bit."""
    image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # a gray PNG of 16 bits, which convert would clip at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resized(image: Image.Image, side: int, method: Image.Resampling) -> Image.Image:
    """The same picture with a shorter side of `side` pixels."""
    ratio = side / min(image.size)
    return image.resize(
        (max(side, round(image.width * ratio)), max(side, round(image.height * ratio))), method
    )


def load_picture(path: Path, size: int, mask_path: Path | None = None) -> tuple[Tensor, Tensor | None]:
    """The largest square in the middle of a picture, at `size` pixels (Lanczos), and the same part of its mask.

    A picture of that size comes back pixel by pixel. White parts of the mask (128 of 255 or more) count: each pixel
    that one of them reaches.

    Returns:
        (3, S, S) float32 in [0, 1] and (S, S) bool, or None without a mask.

    Raises:
        DataError: a file that is no image or broken, or a mask of another size than the picture.
    """
    with opened(path) as file:
        image = upright_rgb(file)
    pixels = np.asarray(_square(image, size, Image.Resampling.LANCZOS), dtype=np.float32) / np.float32(255)
    picture = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    if mask_path is None:
        return picture, None
    with opened(mask_path) as file:
        mask = upright_rgb(file).convert("L")
    if mask.size != image.size:
        wanted = "the picture's size, " + _sides(image)
        raise DataError(f"the mask {mask_path} must have {wanted}, got {_sides(mask)}")
    white = Image.fromarray((np.asarray(mask) >= 128).astype(np.float32))
    # the mean over a box is 0 only where nothing in it is white
    return picture, torch.from_numpy(np.asarray(_square(white, size, Image.Resampling.BOX)) > 0)


def _square(image: Image.Image, size: int, method: Image.Resampling) -> Image.Image:
    image = resized(image, size, method)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _sides(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"
