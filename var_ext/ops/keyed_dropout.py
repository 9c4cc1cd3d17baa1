"""Dropout whose mask is a function of keys: drawn as it is applied, and again in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from var_ext import _torch, backend, reference
from var_ext.ops._checks import FLOATS, check_dtype, check_shape, check_together, require
from var_ext.ops._native import kernels, map_layout, view
from var_ext.ops._registry import differentiate, implement


def _layout(x: Tensor) -> torch.memory_format:
    return map_layout(x) if x.ndim == 4 else torch.contiguous_format


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=_layout(x))


def _native(x: Tensor, keys: Tensor, counter: Tensor, kept: int) -> Tensor:
    out = _empty(x)
    x, keys, counter = x.contiguous(memory_format=_layout(x)), keys.contiguous(), counter.contiguous()
    kernels(x).keyed_dropout(view(x), view(keys), view(counter), view(out), kept)
    return out


def _reference(x: Tensor, keys: Tensor, counter: Tensor, kept: int) -> Tensor:
    return reference.keyed_dropout(x, keys, counter, kept).contiguous(memory_format=_layout(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, keys, counter, ctx.kept = inputs
    ctx.save_for_backward(keys, counter)
    ctx.save_for_forward(keys, counter)


def _masked(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    """Linear in x: tangents and gradients get the mask of x."""
    return torch.ops.var_ext.keyed_dropout.default(tangent, *ctx.saved_tensors, ctx.kept)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _masked(ctx, grad), None, None, None


implement(
    "keyed_dropout",
    "keyed_dropout(Tensor x, Tensor keys, Tensor counter, int kept) -> Tensor",
    native=_native,
    fallback=_reference,
    fake=lambda x, keys, counter, kept: _empty(x),
    float64=False,
)
differentiate("keyed_dropout", _gradient, _setup_context, twice=True, jvp=_masked)


def keyed_dropout(x: Tensor, keys: Tensor, counter: Tensor, kept: int) -> Tensor:
    """Dropout (arXiv 1207.0580) with 16 bits of SplitMix64 an element, keyed by row: x * mask * 2^16 / kept.

    Word i of a row is the hash of key + first + step (i + 1) and decides four elements, the first by its lowest bits;
    maps count in the order of channels last, whatever their memory. The gradient draws the mask again, and has a
    gradient itself; tangents of forward mode get the mask too. A dropped element is a product with 0, so NaN and
    infinities become NaN.

    Args:
        x: (B, ...), float32, bfloat16, float16 or float64; maps (B, C, H, W) may be channels-last, and what is neither
            that nor contiguous is copied first.
        keys: (B,) int64, one a row.
        counter: (2,) int64, first and step (`splitmix64.counter`); read on the device of x, which is not waited for.
        kept: of 2^16 elements, 1..2^16 - 1.

    Returns:
        (B, ...), dtype and memory format of x, rounded once.

    Raises:
        ValueError: shapes do not match, tensors lie on different devices, or `kept` is out of its range.
        TypeError: a dtype is not supported.
    """
    op = "keyed_dropout"
    check_dtype(op, "x", x, FLOATS)
    require(x.ndim > 0, op, "x must have shape (B, ...)", tuple(x.shape))
    check_shape(op, "keys", keys, "(B,)", x.shape[0])
    check_shape(op, "counter", counter, "(2,)", 2)
    for name, numbers in (("keys", keys), ("counter", counter)):
        check_dtype(op, name, numbers, (torch.int64,))
    check_together(op, same_dtype=False, x=x, keys=keys, counter=counter)
    require(0 < kept < 2**16, op, "kept must be in 1..65535, of 2^16", kept)
    if backend.current() == "reference" or _torch.under_transforms():  # torch's own rules of transforms
        return reference.keyed_dropout(x, keys, counter, kept)
    return torch.ops.var_ext.keyed_dropout.default(x, keys, counter, kept)
