"""One picture with its mask at a model's size, for editing."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from var_ext.data.dataset import DataError
from var_ext.data.framing import shortened
from var_ext.data.reading import read_picture, read_rgb

GRAYS = 0.1  # share of a mask that gray edges may cover


def resized(image: Image.Image, side: int, method: Image.Resampling) -> Image.Image:
    """The picture resized to a shorter side of `side` pixels."""
    ratio = side / min(image.size)
    return image.resize(
        (max(side, round(image.width * ratio)), max(side, round(image.height * ratio))), method
    )


def load_picture(path: Path, size: int, mask_path: Path | None = None) -> tuple[Tensor, Tensor | None]:
    """The largest square in the middle of a picture, at `size` pixels (Lanczos), and the same part of its mask.

    A picture of that size is returned unchanged. A pixel is masked if any white part of the mask (128 of 255 or more)
    touches it. Transparent parts are kept, like black ones.

    Returns:
        (3, S, S) float32 in [0, 1] and (S, S) bool, or None without a mask.

    Raises:
        DataError: a file that is not an image, broken or of too many pixels, a mask of another size than the picture,
            or an ambiguous one: with transparent parts, and not just white and black elsewhere.
    """
    image = read_rgb(path)
    pixels = np.asarray(_square(image, size, Image.Resampling.LANCZOS), dtype=np.float32) / np.float32(255)
    picture = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    if mask_path is None:
        return picture, None
    mask = read_picture(mask_path)
    if mask.size != image.size:
        wanted = "the picture's size, " + sides(*image.size)
        raise DataError(f"the mask {mask_path} must have {wanted}, got {sides(*mask.size)}")
    white = Image.fromarray(_white(mask, mask_path).astype(np.float32))
    # the mean over a box is 0 only if nothing in it is white
    return picture, torch.from_numpy(np.asarray(_square(white, size, Image.Resampling.BOX)) > 0)


def _white(mask: Image.Image, path: Path) -> np.ndarray:
    """Where a mask is white, (H, W) bool. Transparent parts are not, whatever their hidden colour."""
    gray = np.asarray(mask.convert("RGB").convert("L"))
    if mask.mode == "RGB":
        return gray >= 128
    opaque = np.asarray(mask.getchannel("A")) >= 128
    seen = gray[opaque]
    if not opaque.all():
        # another colour, or a photograph with a hole: the hole may be what is to be replaced
        came = "not white anywhere" if not (seen >= 128).any() else ""
        if ((seen >= 64) & (seen < 192)).sum() > GRAYS * seen.size:
            came = "neither white nor black"
        if came:
            raise DataError(
                f"the mask {path} has transparent parts, which are kept, but the others are {came}: paint white what "
                "is to be replaced and black what is to be kept, and save it without transparency"
            )
    return opaque & (gray >= 128)


def _square(image: Image.Image, size: int, method: Image.Resampling) -> Image.Image:
    image = resized(shortened(image), size, method)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def sides(width: int, height: int) -> str:
    """Those of a picture, as messages say them."""
    return f"{width} x {height}"
