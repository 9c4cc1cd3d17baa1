"""From a picture file to square crops of its pixels, as in the published recipe (paper, section 4): the shorter side to
1.125 x the image size, then a crop. Of a picture more than `LONGEST` times as long as wide the middle is taken first.

Two choices change pixels, and with them the fingerprint of a data set:

geometry  "published": RGB as Pillow converts it. "upright": as a viewer shows the picture: turned as EXIF says,
          transparent parts on white, gray of 16 bits scaled. They differ only for pictures with one of these.
decode    "exact": Pillow's Lanczos filter, the published pixels bit for bit. "fast": JPEGs of more than twice the size
          are decoded at a half, a quarter or an eighth, and torch's bicubic filter resizes. At 256 px, the pixels of
          two photographs are off by 0.8 of 255 levels on average and by at most 19 (drawn lines: 0.9 and 29).
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from var_ext.data.reading import File, read_published, read_rgb

READERS = {"published": read_published, "upright": read_rgb}
GEOMETRIES, DECODES = tuple(READERS), ("exact", "fast")
MARGIN = 1.125  # shorter side before the crop, in units of the image size
LONGEST = 16  # longer side of what is resized, over the shorter: a line of pixels would get millions of rows
SPARE = 2  # a JPEG is decoded to at least this many times the wanted side, where "fast" decodes it smaller


def check_choices(geometry: str, decode: str) -> None:
    """Raise ValueError unless both are among `GEOMETRIES` and `DECODES`."""
    for name, value, known in (("geometry", geometry, GEOMETRIES), ("decode", decode, DECODES)):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")


def shortened(image: Image.Image) -> Image.Image:
    """The middle of a picture more than `LONGEST` times as long as wide; any other as it is."""
    width, height = image.size
    most = LONGEST * min(width, height)
    # half of what is over from each end: the middle stays where it is
    left, top = (max(0, side - most) // 2 for side in (width, height))
    return image.crop((left, top, width - left, height - top)) if left or top else image


def resized_size(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height with a shorter side of `side`; the longer one is cut to a whole number, as in torchvision."""
    short, long = min(width, height), max(width, height)
    longer = int(side * long / short)
    return (side, longer) if width <= height else (longer, side)


def central_crop(width: int, height: int, size: int) -> tuple[int, int]:
    """Left and top of the middle square; halves go to the even neighbour, as in torchvision."""
    return round((width - size) / 2), round((height - size) / 2)


def random_crop(width: int, height: int, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Left and top of a square, each place equally likely."""
    return int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))


def resized_pixels(file: File, image_size: int, geometry: str, decode: str) -> Tensor:
    """A picture, its shorter side 1.125 x `image_size`: (3, H, W) uint8.

    Raises:
        DataError: not an image, broken, or of too many pixels.
    """
    side = round(MARGIN * image_size)
    image = shortened(READERS[geometry](file, SPARE * side if decode == "fast" else 0))
    width, height = resized_size(*image.size, side)
    if decode == "exact":
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        return _pixels(image)
    pixels = _pixels(image)[None]
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True, align_corners=False)[0]


def _pixels(image: Image.Image) -> Tensor:
    """(3, H, W) uint8, a view of (H, W, 3)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
