"""Zero-shot editing: parts of a given image are kept, the model draws the rest (paper, section 4.4).

In-painting replaces a region, out-painting its surroundings, class-conditional editing draws a class into it. This
needs no training: at each scale, where the mask keeps a token, the given image's code replaces the drawn one in the
sum. Shape letters: N images, M masks (1 or N), S side in pixels, P side of the last token map,
p side of one, L tokens, C channels of a code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from var_ext.models import VQVAE
from var_ext.schedule import ScaleSchedule

DEFAULTS: Mapping[str, Any] = {"cfg": 3.0, "top_k": 900, "top_p": 0.95}  # of the published demo

# A scale of at most this many tokens is kept whole: usually the first, one token for the entire image.
WHOLE_SCALE = 3


@dataclass(frozen=True)
class Region:
    """Where to redraw, in pixels and in tokens of the last scale.

    Attributes:
        replace: (M, S, S) bool, True where a pixel is to be replaced.
        keep: (M, P, P) bool, True where a token is kept.
    """

    replace: Tensor
    keep: Tensor

    @classmethod
    def of(
        cls, mask: Tensor | np.ndarray | Sequence[float], *, image_size: int, grid: int, outside: bool = False
    ) -> Region:
        """Reads a mask or a box.

        What a mask covers is replaced: True, or a value of at least 0.5. Pixels become tokens by one rule: a token
        stays only if none of its pixels is to be replaced.

        Args:
            mask: bool or floating point in [0, 1]: (S, S) for all images, (M, S, S) or (M, 1, S, S); or in tokens of
                the last scale, with P instead of S. Or a box, four numbers (x0, y0, x1, y1): left, top, right and
                bottom edge as fractions of the image's side, rounded to whole tokens as published.
            image_size: S.
            grid: P; S is a multiple of it.
            outside: replace what is outside the mask or box.

        Raises:
            ValueError: another shape, values outside [0, 1], or a box without any token in it.
            TypeError: the mask is not a tensor of bools or floats, or a box not of four numbers.
        """
        if isinstance(mask, np.ndarray) and mask.ndim > 1:
            mask = torch.from_numpy(mask)
        elif not isinstance(mask, Tensor):
            mask = _box(mask, grid)
        masks = _bools(mask)
        side = masks.shape[-1] if masks.ndim > 1 else -1
        if masks.ndim == 4 and masks.shape[1] == 1:
            masks = masks[:, 0]
        elif masks.ndim == 2:
            masks = masks[None]
        if side not in (image_size, grid) or masks.ndim != 3 or masks.shape[1] != side:
            forms = " or ".join(f"({n}, {n}), (M, {n}, {n}), (M, 1, {n}, {n})" for n in (image_size, grid))
            raise ValueError(f"mask must have shape {forms}, got {tuple(mask.shape)}")
        if outside:
            masks = ~masks
        factor = image_size // grid
        if side == image_size:
            tiles = masks.unflatten(1, (grid, factor)).unflatten(3, (grid, factor))  # (M, P, f, P, f)
            return cls(masks, ~tiles.any(dim=4).any(dim=2))
        return cls(masks.repeat_interleave(factor, 1).repeat_interleave(factor, 2), ~masks)


def _bools(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise TypeError(f"mask must be bool or floating point, got {_name(mask)}")
    _check_range("mask", mask)
    return mask >= 0.5


def _box(box: np.ndarray | Sequence[float], grid: int) -> Tensor:
    """(x0, y0, x1, y1) as fractions of the side -> (P, P) bool."""
    wanted = "a box must be four numbers (x0, y0, x1, y1) in [0, 1] with x0 < x1 and y0 < y1"
    try:
        x0, y0, x1, y1 = edges = [float(edge) for edge in box]
    except (TypeError, ValueError) as error:
        raise TypeError(f"mask must be a tensor or a box, and {wanted}, got {box!r}") from error
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ValueError(f"{wanted}, got {tuple(edges)}")
    left, top, right, bottom = (round(edge * grid) for edge in edges)
    if left == right or top == bottom:
        raise ValueError(f"the box {tuple(edges)} must hold a token of the {grid} x {grid} grid, got none")
    inside = torch.zeros(grid, grid, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    return inside


def keep_by_scale(keep: Tensor, schedule: ScaleSchedule) -> Tensor:
    """Which tokens of all scales are kept, given those of the last: the published rule.

    The mask is resized bilinearly (no antialias, corners not aligned) and compared: a token is kept above 0.5. Scales
    of at most three tokens are kept whole.

    Args:
        keep: (M, P, P) bool.

    Returns:
        (M, L) bool on the device of `keep`.
    """
    grid = keep[:, None].to("cpu", torch.float32)  # so that ties at 0.5 agree on all devices
    scales = []
    for side, length in zip(schedule.patch_nums, schedule.lengths, strict=True):
        resized = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
        scales.append(resized.flatten(1).gt(0.5) | (length <= WHOLE_SCALE))
    return torch.cat(scales, dim=1).to(keep.device)


@dataclass(frozen=True)
class KeptCodes:
    """The codes of given images, and where they are kept; called by the sampler at each scale.

    Attributes:
        codes: (N, L, C) float32.
        keep: (N, L) bool, True where a given code stays.
        schedule: the scales.
    """

    codes: Tensor
    keep: Tensor
    schedule: ScaleSchedule

    @classmethod
    @torch.no_grad()
    def of(cls, vae: VQVAE, images: Tensor, keep: Tensor, *, count: int, batch_size: int = 64) -> KeptCodes:
        """Tokenizes images, each of them once.

        Args:
            images: (N, 3, S, S) floating point in [0, 1], or one for all.
            keep: (N, P, P) bool, or one for all.
            count: N.
            batch_size: how many images to tokenize at once.
        """
        weight = vae.quant_conv.weight
        parts = []
        for part in images.to(weight.device).split(batch_size):
            tokens = vae.img_to_idxBl(part.to(weight.dtype) * 2 - 1) if len(part) else []
            parts += [torch.cat(tokens, dim=1)] if tokens else []
        length = vae.schedule.num_tokens
        found = torch.cat(parts) if parts else weight.new_zeros(0, length, dtype=torch.int64)  # (M, L)
        codes = vae.quantize.embedding(found).float()
        keep = keep_by_scale(keep, vae.schedule).to(weight.device)
        return cls(codes.expand(count, -1, -1), keep.expand(count, -1), vae.schedule)

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, rows: slice) -> KeptCodes:
        """The edit of some of the images."""
        return KeptCodes(self.codes[rows], self.keep[rows], self.schedule)

    def __call__(self, codes: Tensor, k: int) -> Tensor:
        """Codes drawn at scale k, (N, p*p, C), with the given ones where kept; same shape and dtype."""
        scale = self.schedule.slices[k]
        return torch.where(self.keep[:, scale, None], self.codes[:, scale].to(codes.dtype), codes)


def checked_images(image: Tensor, size: int) -> Tensor:
    """(3, S, S) or (N, 3, S, S) floating point in [0, 1] -> (N, 3, S, S) float32.

    Raises:
        ValueError: another shape, or values outside [0, 1].
        TypeError: not a tensor of floats.
    """
    if not isinstance(image, Tensor) or not image.is_floating_point():
        came = _name(image) if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image must be a floating point tensor in [0, 1], got {came}")
    if image.ndim not in (3, 4) or image.shape[-3:] != (3, size, size):
        wanted = f"(3, {size}, {size}) or (N, 3, {size}, {size})"
        raise ValueError(f"image must have shape {wanted}, got {tuple(image.shape)}")
    _check_range("image", image)
    return image.detach().float().reshape(-1, 3, size, size)


def common_count(**counts: int) -> int:
    """N, if each of `counts` is 1 or N.

    Raises:
        ValueError: two of them differ, and neither is 1.
    """
    others = {count for count in counts.values() if count != 1}
    if len(others) > 1:
        came = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise ValueError(f"{', '.join(counts)} must be one each or N each, got {came}")
    return others.pop() if others else 1


def _check_range(name: str, values: Tensor) -> None:
    if values.numel() and not bool(((values >= 0) & (values <= 1)).all()):  # NaN fails too
        low, high = (_digits(value) for value in (values.min(), values.max()))
        raise ValueError(f"{name} must hold values in [0, 1], got {low} to {high}")


def _digits(value: Tensor) -> str:
    """A number with just enough digits to distinguish it from its neighbours."""
    known = value.dtype in (torch.float64, torch.float32, torch.float16)
    return str((value if known else value.float()).cpu().numpy()).removesuffix(".0")


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
