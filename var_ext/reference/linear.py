"""Reference of `linear`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, precision: torch.dtype | None = None
) -> Tensor:
    """x W^T + bias, factors and result rounded to `precision`: (..., N), (M, N), (M,) -> (..., M), dtype of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    precision = precision or x.dtype
    x_rounded, weight = (t.to(precision).to(wide) for t in (x, weight))
    y = F.linear(x_rounded, weight, None if bias is None else bias.to(wide))
    return y.to(precision).to(x.dtype)
