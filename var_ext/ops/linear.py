"""Linear layers in training on a CPU: weights are cast and laid out as they are read, not in passes of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from var_ext import _torch, backend, reference
from var_ext.ops._checks import check_dtype, check_last_dim, check_shape, check_together, require
from var_ext.ops._native import kernels, maybe_view, view
from var_ext.ops._registry import differentiate, implement

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
PRECISIONS = (None, torch.float32, torch.bfloat16)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, bf16: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _native(x: Tensor, weight: Tensor, bias: Tensor | None, bf16: bool) -> Tensor:
    out = _fake(x, weight, bias, bf16)
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    kernels(x).linear(view(x), view(weight), maybe_view(bias), view(out), bf16)
    return out


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, bf16: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    def empty(like: Tensor | None, wants: bool) -> Tensor:
        if like is None or not wants:
            return grad.new_empty(0)
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    of_x, of_weight, of_bias = wanted
    return empty(x, of_x), empty(weight, of_weight), empty(bias, of_bias)


def _native_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, bf16: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grads = _fake_backward(grad, x, weight, bias, bf16, wanted)
    given = [view(found) if wants else None for found, wants in zip(grads, wanted, strict=True)]
    kernel: Any = kernels(x).linear_backward
    kernel(view(grad), view(x), view(weight), *given, bf16)
    return grads


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, bf16: bool) -> Tensor:
    return reference.linear(x, weight, bias, precision=_precision(x, bf16)).contiguous()


def _precision(x: Tensor, bf16: bool) -> torch.dtype:
    return torch.bfloat16 if bf16 else torch.promote_types(x.dtype, torch.float32)


def _reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, bf16: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    wide, precision = torch.promote_types(x.dtype, torch.float32), _precision(x, bf16)
    factors = (t.to(precision).to(wide) for t in (grad, x, weight))
    rounded, x_rounded, weight_rounded = (t.flatten(0, -2) if t.ndim > 1 else t[None] for t in factors)
    grads = _fake_backward(grad, x, weight, bias, bf16, wanted)
    if wanted[0]:
        grads[0].copy_((rounded @ weight_rounded).view(x.shape))
    if wanted[1]:
        grads[1].copy_(rounded.t() @ x_rounded)
    if wanted[2]:
        grads[2].copy_(grad.to(wide).reshape(-1, len(weight)).sum(0))
    return grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.bf16 = inputs
    ctx.save_for_backward(x, weight, bias)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    found = torch.ops.var_ext.linear_backward.default(grad, x, weight, bias, ctx.bf16, wanted)
    return *(of if wants else None for of, wants in zip(found, wanted, strict=True)), None


implement(
    "linear",
    "linear(Tensor x, Tensor weight, Tensor? bias, bool bf16) -> Tensor",
    native=_native,
    fallback=_reference,
    fake=_fake,
    float64=False,
)
implement(
    "linear",
    "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool bf16, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor)",
    native=_native_backward,
    fallback=_reference_backward,
    fake=_fake_backward,
    float64=False,
)
differentiate("linear", _gradient, _setup_context)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, precision: torch.dtype | None = None
) -> Tensor:
    """x W^T + bias. The weight may be wider than the precision of the product, as under autocast: its copy is made
    where the kernel lays it out, and its gradient is a float32 sum. On a GPU the products are torch's.

    Args:
        x: (..., N), float32, bfloat16 or float64.
        weight: (M, N), float32 or bfloat16, whichever x is; float64 where x is.
        bias: (M,), the same; added in float32.
        precision: what factors and the result are rounded to: float32 or bfloat16; None: the dtype of x. Sums are
            float32 at least, and so are gradients before they get their dtypes.

    Returns:
        (..., M), dtype of x, contiguous. No sum depends on the number of rows or of threads.

    Raises:
        ValueError: shapes do not match, tensors lie on different devices, or the precision is another one.
        TypeError: a dtype is not supported.
    """
    op = "linear"
    check_shape(op, "weight", weight, "(M, N)", None, None)
    check_last_dim(op, "x", x, "(..., N)", weight.shape[1])
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_dtype(op, name, tensor, DTYPES)
    if bias is not None:
        check_shape(op, "bias", bias, "(M,)", weight.shape[0])
    together = torch.float64 in (x.dtype, weight.dtype)
    check_together(op, same_dtype=together, x=x, weight=weight, bias=bias)
    require(precision in PRECISIONS, op, "precision must be torch.float32, torch.bfloat16 or None", precision)
    if (
        not backend.use_native("linear", x.device.type) or _torch.under_transforms()
    ):  # torch's own, its gradient too
        return reference.linear(x, weight, bias, precision=precision)
    bf16 = (x.dtype if precision is None else precision) == torch.bfloat16
    return torch.ops.var_ext.linear.default(x, weight, bias, bf16)
