"""Reference of `quantize_rows`."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_SCALE = 2.0**-120


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as bytes around 128 and one scale per row: (..., C) -> (..., C) uint8, (..., 1) float32."""
    wide = x.detach().float()
    largest = wide.abs().amax(dim=-1, keepdim=True)  # (..., 1)
    finite = largest.isfinite()
    # by a tensor: on CUDA, torch turns division by a number into multiplication by its rounded reciprocal
    bits = (largest / torch.full_like(largest, 127)).view(torch.int32)
    scale = ((bits + 0xFFFF) & -0x10000).view(torch.float32).clamp_min(LEAST_SCALE)  # up to a bfloat16 number
    scale = scale.where(largest != 0, 1).where(finite, torch.nan)
    q = (wide * scale.reciprocal()).round().where(finite, 0) + 128  # (..., C)
    return q.to(torch.uint8).contiguous(), scale
