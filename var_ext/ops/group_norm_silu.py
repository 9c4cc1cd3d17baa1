"""GroupNorm followed by SiLU, the pair in front of each convolution of the tokenizer."""

from __future__ import annotations

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import FLOATS, check_dtype, check_shape, check_together, require
from var_ext.ops._registry import compose

compose(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps) -> Tensor",
    lambda x, weight, bias, groups, eps: reference.group_norm_silu(x, weight, bias, groups=groups, eps=eps),
)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, *, groups: int = 32, eps: float = 1e-6
) -> Tensor:
    """SiLU(GroupNorm(x)), statistics in float32 (VQGAN's normalization, arXiv 2012.09841).

    Args:
        x: (B, C, H, W), float32, bfloat16, float16 or float64; contiguous or channels-last.
        weight, bias: (C,), dtype of x.
        groups: number of groups, a divisor of C.
        eps: added to the variance.

    Returns:
        (B, C, H, W), dtype and memory format of x.

    Raises:
        ValueError: shapes do not match, groups does not divide C, or tensors lie on different devices.
        TypeError: dtypes differ or are not supported.
    """
    op = "group_norm_silu"
    check_shape(op, "x", x, "(B, C, H, W)", None, None, None, None)
    channels = x.shape[1]
    check_shape(op, "weight", weight, "(C,)", channels)
    check_shape(op, "bias", bias, "(C,)", channels)
    require(groups >= 1 and channels % groups == 0, op, f"groups must divide C = {channels}", groups)
    check_dtype(op, "x", x, FLOATS)
    check_together(op, x=x, weight=weight, bias=bias)
    if backend.current() == "reference":
        return reference.group_norm_silu(x, weight, bias, groups=groups, eps=eps)
    return torch.ops.var_ext.group_norm_silu(x, weight, bias, groups, eps)
