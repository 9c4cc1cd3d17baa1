"""Pictures of many images: a grid with names beside its rows and above its columns; and pictures as files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from var_ext.checkpoints import atomic_write

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
}
GAP = 4
FONT_SIZE = 14
MIN_CELL = 64  # smaller images are enlarged by a whole factor, pixel by pixel, so that they can be seen


def labelled_grid(images: torch.Tensor, rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """Lays images out row by row.

    Args:
        images: (len(rows) * len(columns), 3, H, W) floating point in [0, 1]; what lies outside is clipped.
        rows: the text at the left of each row.
        columns: the text above each column.

    Raises:
        ValueError: the number of images or their shape is another.
    """
    if images.ndim != 4 or images.shape[:2] != (len(rows) * len(columns), 3):
        raise ValueError(
            f"images must have shape ({len(rows) * len(columns)}, 3, H, W) for {len(rows)} rows of "
            f"{len(columns)}, got {tuple(images.shape)}"
        )
    pixels = _enlarged(images)
    height, width = pixels.shape[1:3]

    font = ImageFont.load_default(FONT_SIZE)
    left = 2 * GAP + max(round(font.getlength(name)) for name in rows)
    top = 2 * GAP + FONT_SIZE
    size = (left + len(columns) * (width + GAP), top + len(rows) * (height + GAP))
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for j, name in enumerate(columns):
        draw.text((left + j * (width + GAP) + width // 2, top // 2), name, "black", font, anchor="mm")
    for i, name in enumerate(rows):
        middle = top + i * (height + GAP) + height // 2
        draw.text((left - GAP, middle), name, "black", font, anchor="rm")
        for j in range(len(columns)):
            place = (left + j * (width + GAP), top + i * (height + GAP))
            grid.paste(Image.fromarray(pixels[i * len(columns) + j]), place)
    return grid


def captioned_grid(images: torch.Tensor, captions: Sequence[str], columns: int) -> Image.Image:
    """Lays images out in rows of `columns`, each with its caption above; one that is too long for it is cut.

    Args:
        images: (N, 3, H, W) floating point in [0, 1], N at least 1; what lies outside is clipped.
        captions: N texts; all empty: no room is left for them.
        columns: images of a row.
    """
    pixels = _enlarged(images)
    (height, width), font = pixels.shape[1:3], ImageFont.load_default(FONT_SIZE)
    head = FONT_SIZE + GAP if any(captions) else 0
    columns = min(columns, len(pixels))
    rows, right, down = -(-len(pixels) // columns), width + GAP, head + height + GAP
    grid = Image.new("RGB", (GAP + columns * right, GAP + rows * down), "white")
    draw = ImageDraw.Draw(grid)
    for i, caption in enumerate(captions):
        left, top = GAP + i % columns * right, GAP + i // columns * down
        text = _cut(caption, font, width)
        draw.text((left + width // 2, top + FONT_SIZE // 2), text, "black", font, anchor="mm")
        grid.paste(Image.fromarray(pixels[i]), (left, top + head))
    return grid


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _enlarged(images: torch.Tensor) -> np.ndarray:
    """(N, 3, H, W) in [0, 1] -> (N, f H, f W, 3) uint8, large enough to be seen."""
    factor = max(1, -(-MIN_CELL // images.shape[3]))
    return np.repeat(np.repeat(_bytes(images), factor, axis=1), factor, axis=2)


def shown_classes(num_classes: int) -> list[int]:
    """Classes of a grid where none are asked for: all, or 8 of many."""
    every = 1 if num_classes <= 20 else num_classes // 8
    return list(range(0, num_classes, every))[: 8 if every > 1 else None]


def edit_sheet(
    before: torch.Tensor, replaced: torch.Tensor, after: torch.Tensor, row: str, columns: Sequence[str]
) -> Image.Image:
    """An edited image in one row: before, what is kept of it (the rest is gray), after.

    Args:
        before: (3, H, W) floating point in [0, 1].
        replaced: (H, W) bool.
        after: (len(columns), 3, H, W) as `before`.
        row, columns: names of the row and of the images after.
    """
    kept = before.masked_fill(replaced, 0.5)
    return labelled_grid(torch.cat((torch.stack((before, kept)), after)), [row], ["before", "mask", *columns])


def tiles(images: torch.Tensor, columns: int) -> torch.Tensor:
    """Images (N, 3, H, W) side by side in rows of `columns`, as one (3, rows H, columns W); the last row is filled up
    with black."""
    rows = -(-len(images) // columns)
    grid = images.new_zeros(rows * columns, *images.shape[1:])
    grid[: len(images)] = images
    return grid.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Images (N, 3, H, W) floating point in [0, 1] as N pictures; what lies outside is clipped.

    Raises:
        ValueError: they have another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        hint = "; give images[None] for one" if images.ndim == 3 else ""
        raise ValueError(f"images must have shape (N, 3, H, W), got {tuple(images.shape)}{hint}")
    return [Image.fromarray(pixels) for pixels in _bytes(images)]


def picture_format(path: str | os.PathLike[str]) -> str:
    """Pillow's name of the format that the name of a file asks for.

    Raises:
        ValueError: it asks for none that is written here.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(
            f"the name of a picture must end with one of {', '.join(FORMATS)}, got {os.fspath(path)!r}"
        )
    return FORMATS[suffix]


def save_picture(picture: Image.Image, path: str | os.PathLike[str]) -> None:
    """Writes a picture in the format of its name, without loss but in JPEG.

    Raises:
        ValueError: see `picture_format`.
        CheckpointError: the file cannot be written.
    """
    kind = picture_format(path)
    with atomic_write(path) as handle:
        # each format takes what it knows of these
        picture.save(handle, format=kind, lossless=True, quality=95, subsampling=0)


def _bytes(images: torch.Tensor) -> np.ndarray:
    """(N, 3, H, W) in [0, 1] -> (N, H, W, 3) uint8."""
    return (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
