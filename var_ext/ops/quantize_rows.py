"""Activations as bytes with one scale per row: the input of an int8 linear layer with dynamic quantization."""

from __future__ import annotations

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import check_dtype, check_together, require
from var_ext.ops._native import kernels, view
from var_ext.ops._registry import implement

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _native(x: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = _fake(x)
    rows = x.reshape(-1, x.shape[-1])  # (R, C)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    kernels(x).quantize_rows(view(rows), view(q.view(rows.shape)), view(scale.view(-1)))
    return q, scale


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


implement(
    "quantize_rows",
    "quantize_rows(Tensor x) -> (Tensor, Tensor)",
    native=_native,
    fallback=reference.quantize_rows,
    fake=_fake,
)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as bytes around 128 and one scale: x is approximately (q - 128) * scale. Not differentiable.

    The scale is max |x| / 127 in float32, rounded up to a bfloat16 number and at least 2^-120; of a row of zeros it is
    1. q is 128 plus the integer nearest to x * (1 / scale), ties to even; the reciprocal and the product are rounded to
    float32. No clamp is needed: q lies in [1, 255]. All backends give the same bits.

    If a row contains NaN or infinity, its scale is NaN and its q is 128 throughout, so that products with the scale
    are NaN.

    Args:
        x: (..., C) float32, bfloat16 or float16, C >= 1; copied first if its rows are not dense or not evenly
            spaced.

    Returns:
        q (..., C) uint8 and the scale (..., 1) float32, both contiguous.

    Raises:
        ValueError: x has no channels, or lies on a device without kernels.
        TypeError: x has another dtype.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"quantize_rows: x must be a tensor of shape (..., C), got {type(x).__name__}")
    wanted = "x must have shape (..., C) with C >= 1"
    require(x.ndim >= 1 and x.shape[-1] >= 1, "quantize_rows", wanted, tuple(x.shape))
    check_dtype("quantize_rows", "x", x, _DTYPES)
    check_together("quantize_rows", x=x)
    x = x.detach()
    if backend.current() == "reference":
        return reference.quantize_rows(x)
    return torch.ops.var_ext.quantize_rows.default(x)
