"""Reference of `bicubic_upsample`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def bicubic_upsample(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Bicubic interpolation (a = -0.75, half-pixel centres, no antialias): (B, C, h, w) -> (B, C, H, W)."""
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False)
