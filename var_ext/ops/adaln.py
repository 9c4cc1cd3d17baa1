"""Adaptive LayerNorm, with the gated residual in front of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import FLOATS, check_dtype, check_shape, check_together
from var_ext.ops._native import kernels, maybe_view, rows, scratch, view
from var_ext.ops._registry import differentiate, implement


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _native(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    x, scale, shift = rows(x), rows(scale), rows(shift)
    y = _empty(x)
    kernels(x).adaln(view(x), view(scale), view(shift), None, None, None, view(y), eps)
    return y


def _native_residual(
    x: Tensor, scale: Tensor, shift: Tensor, branch: Tensor, gate: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x, scale, shift, branch, gate = rows(x), rows(scale), rows(shift), rows(branch), rows(gate)
    h, y = _empty(x), _empty(x)
    kernels(x).adaln(view(x), view(scale), view(shift), view(branch), view(gate), view(h), view(y), eps)
    return h, y


def _native_backward(grad_y: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    grad_y, x, scale = rows(grad_y), rows(x), rows(scale)
    grads = _empty(x), _empty(scale), _empty(scale)
    sums = _sums(x, 2)
    kernel: Any = kernels(x).adaln_backward
    given = view(grad_y), view(x), view(scale), None, None, None
    kernel(*given, *map(view, grads), None, None, maybe_view(sums), eps)
    return grads


def _native_residual_backward(
    grad_h: Tensor, grad_y: Tensor, x: Tensor, scale: Tensor, branch: Tensor, gate: Tensor, eps: float
) -> tuple[Tensor, ...]:
    given = rows(grad_y), rows(x), rows(scale), rows(grad_h), rows(branch), rows(gate)
    grads = _empty(x), _empty(scale), _empty(scale), _empty(x), _empty(scale)
    sums = _sums(x, 3)
    kernel: Any = kernels(x).adaln_backward
    kernel(*map(view, given), *map(view, grads), maybe_view(sums), eps)
    return grads


def _sums(x: Tensor, vectors: int) -> Tensor | None:
    """Scratch memory of the CUDA kernels for sums over chunks of tokens, for each vector of a sample.

    Gradients depend on the number of chunks, so it is the same on all chips: 8 blocks for each of 132 multiprocessors,
    but at least 4 tokens per chunk.
    """
    batch, length, channels = x.shape
    partials = max(1, min(-(-length // 4), 1056 // max(batch, 1)))
    return scratch(x, batch, partials, vectors, channels)


def _reference_backward(grad_y: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    def forward(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = reference.adaln(x, scale, shift, eps=eps)
        assert isinstance(y, Tensor)  # without a branch, only y
        return y

    return _pull(forward, grad_y, x, scale, torch.zeros_like(scale))


def _reference_residual_backward(
    grad_h: Tensor, grad_y: Tensor, x: Tensor, scale: Tensor, branch: Tensor, gate: Tensor, eps: float
) -> tuple[Tensor, ...]:
    def forward(x: Tensor, scale: Tensor, shift: Tensor, branch: Tensor, gate: Tensor) -> Any:
        return reference.adaln(x, scale, shift, branch=branch, gate=gate, eps=eps)

    return _pull(forward, (grad_h, grad_y), x, scale, torch.zeros_like(scale), branch, gate)


def _pull(forward: Callable[..., Any], grad: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    pull: Any = torch.func.vjp(forward, *inputs)[1]
    return tuple(_contiguous(g) for g in pull(grad))


def _contiguous(x: Any) -> Any:
    return x.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, scale, _, *branch_and_gate, ctx.eps = inputs
    ctx.save_for_backward(x, scale, *branch_and_gate)


implement(
    "adaln",
    "adaln(Tensor x, Tensor scale, Tensor shift, float eps) -> Tensor",
    native=_native,
    fallback=lambda x, scale, shift, eps: _contiguous(reference.adaln(x, scale, shift, eps=eps)),
    fake=lambda x, *_: _empty(x),
    float64=False,
)
implement(
    "adaln",
    "adaln_residual(Tensor x, Tensor scale, Tensor shift, Tensor branch, Tensor gate, float eps)"
    " -> (Tensor, Tensor)",
    native=_native_residual,
    fallback=lambda x, scale, shift, branch, gate, eps: tuple(
        map(_contiguous, reference.adaln(x, scale, shift, branch=branch, gate=gate, eps=eps))
    ),
    fake=lambda x, *_: (_empty(x), _empty(x)),
    float64=False,
)
implement(
    "adaln",
    "adaln_backward(Tensor grad_y, Tensor x, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
    native=_native_backward,
    fallback=_reference_backward,
    fake=lambda grad_y, x, scale, eps: (_empty(x), _empty(scale), _empty(scale)),
    float64=False,
)
implement(
    "adaln",
    "adaln_residual_backward(Tensor grad_h, Tensor grad_y, Tensor x, Tensor scale, Tensor branch, Tensor gate,"
    " float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    native=_native_residual_backward,
    fallback=_reference_residual_backward,
    fake=lambda grad_h, grad_y, x, scale, branch, gate, eps: (
        _empty(x), _empty(scale), _empty(scale), _empty(x), _empty(scale),
    ),
    float64=False,
)  # fmt: skip
differentiate(
    "adaln",
    lambda ctx, grad_y: (
        *torch.ops.var_ext.adaln_backward.default(grad_y, *ctx.saved_tensors, ctx.eps),
        None,
    ),
    _setup_context,
)
differentiate(
    "adaln_residual",
    lambda ctx, grad_h, grad_y: (
        *torch.ops.var_ext.adaln_residual_backward.default(grad_h, grad_y, *ctx.saved_tensors, ctx.eps),
        None,
    ),
    _setup_context,
)


@overload
def adaln(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor: ...
@overload
def adaln(
    x: Tensor, scale: Tensor, shift: Tensor, *, branch: Tensor, gate: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]: ...
def adaln(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = LayerNorm(x) * (1 + scale) + shift, optionally after x += gate * branch (paper, section 3.2; DiT).

    Args:
        x: (B, L, C), float32, bfloat16, float16 or float64.
        scale, shift: (B, C), dtype of x.
        branch: (B, L, C), the output of the previous branch; needs `gate`.
        gate: (B, C).
        eps: added to the variance; LayerNorm has no weights of its own.

    Returns:
        y, (B, L, C), or with a branch the new x and y.

    Raises:
        ValueError: shapes do not match, branch without gate, or tensors lie on different devices.
        TypeError: dtypes differ or are not supported.
    """
    op = "adaln"
    check_shape(op, "x", x, "(B, L, C)", None, None, None)
    batch, _, channels = x.shape
    check_shape(op, "scale", scale, "(B, C)", batch, channels)
    check_shape(op, "shift", shift, "(B, C)", batch, channels)
    if (branch is None) != (gate is None):
        missing = "branch" if branch is None else "gate"
        raise ValueError(f"{op}: branch and gate must be given together, got no {missing}")
    if branch is not None and gate is not None:
        check_shape(op, "branch", branch, "(B, L, C)", *x.shape)
        check_shape(op, "gate", gate, "(B, C)", batch, channels)
    check_dtype(op, "x", x, FLOATS)
    check_together(op, x=x, scale=scale, shift=shift, branch=branch, gate=gate)
    if backend.current() == "reference":
        return reference.adaln(x, scale, shift, branch=branch, gate=gate, eps=eps)
    if branch is None:
        return torch.ops.var_ext.adaln.default(x, scale, shift, eps)
    return torch.ops.var_ext.adaln_residual.default(x, scale, shift, branch, gate, eps)
