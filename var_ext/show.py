"""`show`: images with their classes' names, as a picture that notebooks display and files keep."""

from __future__ import annotations

import io
import os
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from var_ext.checkpoints import atomic_write
from var_ext.grid import captioned_grid, labelled_grid, save_picture

FRAME, LAST_FRAME = 300, 1500  # milliseconds of an animation


@dataclass(frozen=True)
class Grid:
    """A picture of images; of stages also an animation, coarse to fine.

    Attributes:
        picture: all of it at once.
        frames: a picture after each scale, or none.
    """

    picture: Image.Image
    frames: tuple[Image.Image, ...] = ()

    def to_pil(self) -> Image.Image:
        """The picture."""
        return self.picture

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the picture in the format of the file's name, or the animation of stages into NAME.gif.

        Raises:
            ValueError: the name asks for no known format, or for an animation of what has no stages.
            CheckpointError: the file cannot be written.
        """
        if Path(path).suffix.lower() != ".gif":
            save_picture(self.picture, path)
            return
        if not self.frames:
            wanted = "a .gif is an animation of stages, as Sampler.scales gives them"
            raise ValueError(f"{wanted}, got one picture for {os.fspath(path)!r}")
        with atomic_write(path) as handle:
            handle.write(self._gif())

    def _gif(self) -> bytes:
        content, (first, *others) = io.BytesIO(), self.frames
        durations = [FRAME] * len(others) + [LAST_FRAME]
        first.save(content, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
        return content.getvalue()

    def _repr_png_(self) -> bytes:
        return png(self.picture)

    def _repr_html_(self) -> str:
        kind, content = ("gif", self._gif()) if self.frames else ("png", self._repr_png_())
        return f'<img alt="images" src="data:image/{kind};base64,{b64encode(content).decode()}">'


def png(picture: Image.Image) -> bytes:
    """The content of a PNG file of a picture."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def show(
    images: Tensor,
    labels: Tensor | Sequence[int | str] | int | str | None = None,
    *,
    names: Sequence[str] | None = None,
    columns: int = 8,
    scales: Sequence[int] | None = None,
) -> Grid:
    """Images as a picture, each with the name of its class above.

    A notebook displays what comes back, and `save` and `to_pil` take it further:

        show(sampler(labels, seeds), labels, names=sampler.class_names)
        show(sampler.scales(3, [7, 8]), 3).save("threes.gif")

    Args:
        images: (N, 3, H, W) floating point in [0, 1], or one (3, H, W); or stages (K, N, 3, H, W), whose picture has a
            row an image and a column a scale. What lies outside [0, 1] is clipped.
        labels: (N,) classes or texts, or one for all; None: nothing is written above.
        names: of the classes, as `Sampler.class_names`; None: their numbers.
        columns: images of a row; of stages that of the animation.
        scales: of stages the side of each token map, `patch_nums`, for show; None: they are numbered.

    Raises:
        ValueError: images have another shape or there are none, labels or scales differ in number, a label has no
            name, or columns is not positive.
    """
    stages = images[None, None] if images.ndim == 3 else images[None] if images.ndim == 4 else images
    if stages.ndim != 5 or stages.shape[2] != 3 or 0 in stages.shape:
        wanted = "(N, 3, H, W), (3, H, W) or (K, N, 3, H, W), at least one"
        raise ValueError(f"images must have shape {wanted}, got {tuple(images.shape)}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    count, captions = stages.shape[1], _captions(labels, names)
    captions = captions * count if len(captions) == 1 else captions
    if len(captions) != count:
        raise ValueError(f"labels must be one or {count}, one an image, got {len(captions)}")
    frames = tuple(captioned_grid(stage, captions, columns) for stage in stages)
    if images.ndim < 5:
        return Grid(frames[0])
    if scales is not None and len(scales) != len(stages):
        raise ValueError(f"scales must be {len(stages)}, one a stage, got {len(scales)}")
    above = [str(k + 1) for k in range(len(stages))] if scales is None else [f"{p} x {p}" for p in scales]
    return Grid(labelled_grid(stages.transpose(0, 1).flatten(0, 1), captions, above), frames)


def class_name(names: Sequence[str] | None, label: int) -> str:
    """What a label is called: of `names`, the one after the last is "no class"; without them its number.

    Raises:
        ValueError: it has no name.
    """
    if names is None:
        return str(label)
    if not 0 <= label <= len(names):
        raise ValueError(f"labels must be in 0..{len(names)}, got {label}")
    return names[label] if label < len(names) else "no class"


def _captions(
    labels: Tensor | Sequence[int | str] | int | str | None, names: Sequence[str] | None
) -> list[str]:
    if labels is None:
        return [""]
    given = labels.reshape(-1).tolist() if isinstance(labels, Tensor) else labels
    row = [given] if isinstance(given, int | str) else list(given)
    return [each if isinstance(each, str) else class_name(names, int(each)) for each in row]
