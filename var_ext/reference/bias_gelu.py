"""Reference of `bias_gelu`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias) in its tanh form: (..., C) -> (..., C)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.gelu(x.to(wide) + bias.to(wide), approximate="tanh").to(x.dtype)
