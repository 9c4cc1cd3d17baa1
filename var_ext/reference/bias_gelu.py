"""Reference of `bias_gelu`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias) in its tanh form: (..., C) -> (..., C)."""
    return F.gelu(x + bias, approximate="tanh")
