"""Reference of `area_downsample`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def area_downsample(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Mean over the area of each output cell: (B, C, H, W) -> (B, C, h, w)."""
    return F.interpolate(x, size=size, mode="area")
