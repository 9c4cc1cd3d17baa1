"""The end of a residual branch: its last convolution's output and bias, added to the stream."""

from __future__ import annotations

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import FLOATS, check_dtype, check_shape, check_together
from var_ext.ops._native import kernels, map_layout, view
from var_ext.ops._registry import implement


def _empty(h: Tensor) -> Tensor:
    return torch.empty_like(h, memory_format=map_layout(h))


def _into(out: Tensor, h: Tensor, x: Tensor, bias: Tensor) -> None:
    layout = map_layout(out)
    h, x, bias = h.contiguous(memory_format=layout), x.contiguous(memory_format=layout), bias.contiguous()
    kernels(h).bias_residual(view(h), view(x), view(bias), view(out))


def _native(h: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    out = _empty(h)
    _into(out, h, x, bias)
    return out


def _native_in_place(h: Tensor, x: Tensor, bias: Tensor) -> None:
    if h.is_contiguous(memory_format=map_layout(h)):
        _into(h, h, x, bias)
    else:
        h.copy_(_native(h, x, bias))


def _reference_in_place(h: Tensor, x: Tensor, bias: Tensor) -> None:
    reference.bias_residual(h, x, bias, in_place=True)


implement(
    "bias_residual",
    "bias_residual(Tensor h, Tensor x, Tensor bias) -> Tensor",
    native=_native,
    fallback=reference.bias_residual,
    fake=lambda h, x, bias: _empty(h),
    float64=False,
)
implement(
    "bias_residual",
    "bias_residual_in_place(Tensor(a!) h, Tensor x, Tensor bias) -> ()",
    native=_native_in_place,
    fallback=_reference_in_place,
    fake=lambda h, x, bias: None,
    float64=False,
)


def bias_residual(h: Tensor, x: Tensor, bias: Tensor, *, in_place: bool = False) -> Tensor:
    """h + bias + x, the end of a residual block of the tokenizer (arXiv 2012.09841). No gradient.

    Args:
        h: (B, C, H, W), float32, bfloat16, float16 or float64: the branch; contiguous, channels-last, or copied first.
        x: (B, C, H, W), dtype of h: the stream; copied first if its memory format is another.
        bias: (C,), dtype of h: of the convolution that made h.
        in_place: write to h. x may be h itself, but must not share a part of its memory.

    Returns:
        (B, C, H, W), dtype and memory format of h, added in float32 at least; h if in place.

    Raises:
        ValueError: shapes do not match, or tensors lie on different devices.
        TypeError: dtypes differ or are not supported.
    """
    op = "bias_residual"
    check_shape(op, "h", h, "(B, C, H, W)", None, None, None, None)
    check_shape(op, "x", x, "(B, C, H, W)", *h.shape)
    check_shape(op, "bias", bias, "(C,)", h.shape[1])
    check_dtype(op, "h", h, FLOATS)
    check_together(op, h=h, x=x, bias=bias)
    h, x, bias = h.detach(), x.detach(), bias.detach()
    if backend.current() == "reference":
        return reference.bias_residual(h, x, bias, in_place=in_place)
    if not in_place:
        return torch.ops.var_ext.bias_residual.default(h, x, bias)
    torch.ops.var_ext.bias_residual_in_place.default(h, x, bias)
    return h
