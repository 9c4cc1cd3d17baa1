"""Registration shared by the two interpolations: forward, backward, fakes and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from var_ext.ops._checks import FLOATS, as_size, check_dtype, check_shape, check_together
from var_ext.ops._native import kernels, view
from var_ext.ops._registry import differentiate, implement


def register_interpolation(op: str, reference: Callable[[Tensor, tuple[int, int]], Tensor]) -> None:
    """Register `op(x, h, w)` and `op_backward(grad, height, width)`; outputs are channels-last where inputs are."""

    def forward(x: Tensor, h: int, w: int) -> Tensor:
        out = fake(x, h, w)
        getattr(kernels(x), op)(view(x), view(out))
        return out

    def backward(grad: Tensor, height: int, width: int) -> Tensor:
        grad_in = fake(grad, height, width)
        getattr(kernels(grad), f"{op}_backward")(view(grad), view(grad_in))
        return grad_in

    def fake(x: Tensor, h: int, w: int) -> Tensor:
        shape = (x.shape[0], x.shape[1], h, w)
        if _is_channels_last(x):
            return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        return x.new_empty(shape)

    def reference_backward(grad: Tensor, height: int, width: int) -> Tensor:
        size = (grad.shape[2], grad.shape[3])
        pull: Any = torch.func.vjp(lambda x: reference(x, size), fake(grad, height, width))[1]
        return fake(grad, height, width).copy_(pull(grad)[0])

    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        ctx.size = inputs[0].shape[2:]

    def gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return backward_op(grad, *ctx.size), None, None

    def double_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return forward_op(grad, *ctx.size), None, None  # the map is linear

    implement(
        op,
        f"{op}(Tensor x, SymInt h, SymInt w) -> Tensor",
        native=forward,
        fallback=lambda x, h, w: fake(x, h, w).copy_(reference(x, (h, w))),
        fake=fake,
    )
    implement(
        op,
        f"{op}_backward(Tensor grad, SymInt height, SymInt width) -> Tensor",
        native=backward,
        fallback=reference_backward,
        fake=fake,
    )
    forward_op = getattr(torch.ops.var_ext, op).default
    backward_op = getattr(torch.ops.var_ext, f"{op}_backward").default
    differentiate(op, gradient, setup_context, twice=True)
    differentiate(f"{op}_backward", double_gradient, setup_context, twice=True)


def _is_channels_last(x: Tensor) -> bool:
    """torch's own rule for the layout of a result: read off the strides, never true of a contiguous tensor too."""
    if x.is_contiguous() or x.stride(1) == 0 or x.numel() == 0:
        return False
    least = 0
    for axis in (1, 3, 2, 0):
        if x.stride(axis) < least or (axis == 0 and least == x.stride(1)):
            return False
        least = x.stride(axis) * x.shape[axis]
    return True


def checked_size(op: str, x: Tensor, size: int | tuple[int, int]) -> tuple[int, int]:
    """Check the arguments of an interpolation; (h, w)."""
    check_shape(op, "x", x, "(B, C, H, W)", None, None, None, None)
    check_dtype(op, "x", x, FLOATS)
    check_together(op, x=x)
    if min(x.shape[2:]) < 1:
        raise ValueError(f"{op}: x must have H and W of at least 1, got {tuple(x.shape)}")
    return as_size(op, size)
