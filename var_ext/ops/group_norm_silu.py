"""GroupNorm followed by SiLU, the pair in front of each convolution of the tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import FLOATS, check_dtype, check_shape, check_together, require
from var_ext.ops._native import kernels, map_layout, maybe_view, multiprocessors, scratch, view
from var_ext.ops._registry import differentiate, implement


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=map_layout(x))


def _stats(x: Tensor, groups: int) -> Tensor:
    """(B, groups, 2) float32 for mean and 1 / deviation, which backward reads on a GPU; without elements elsewhere."""
    kept = None if x.dtype == torch.float64 else scratch(x, x.shape[0], groups, 2)
    return x.new_empty(0, dtype=torch.float32) if kept is None else kept


def _chunks(x: Tensor, *, backward: bool = False) -> Tensor | None:
    """Scratch memory of the CUDA kernels for sums over chunks of pixels.

    As many chunks as the chip runs blocks at once (the budgets beside the kernels), so that they run in one wave and
    the sums over them stay short; but at least 64 pixels each, or 4096 where each channel has its own blocks.
    Sums, and so the last bits of results, depend on their number.
    """
    count = multiprocessors(x)
    if not count:  # not a GPU: checking the layout costs as much as the rest of a small call
        return None
    batch, channels, height, width = x.shape
    by_rows = map_layout(x) == torch.channels_last
    resident = (3 if by_rows else 4) - backward
    least, shares = (64, batch) if by_rows else (4096, batch * channels)
    partials = max(1, min(-(-height * width // least), resident * count // max(shares, 1)))
    return scratch(x, batch, partials, channels, 2)


def _native(
    x: Tensor, weight: Tensor, bias: Tensor, input_bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    layout, stats, chunks = map_layout(x), _stats(x, groups), _chunks(x)
    out, x = torch.empty_like(x, memory_format=layout), x.contiguous(memory_format=layout)
    given = view(x), view(weight), view(bias), maybe_view(input_bias), view(out)
    kernels(x).group_norm_silu(
        *given, view(stats) if stats.ndim == 3 else None, maybe_view(chunks), groups, eps
    )
    return out, stats


def _native_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    input_bias: Tensor | None,
    stats: Tensor,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _fake_backward(grad, x, weight, bias, input_bias, stats, groups, eps)
    layout, chunks, means = map_layout(x), _chunks(x, backward=True), scratch(x, x.shape[0], groups, 2)
    grad, x = grad.contiguous(memory_format=layout), x.contiguous(memory_format=layout)
    given = view(grad), view(x), view(weight), view(bias), maybe_view(input_bias), *map(view, grads)
    kernel: Any = kernels(x).group_norm_silu_backward
    of_groups = view(stats) if stats.ndim == 3 else None
    kernel(*given, of_groups, maybe_view(means), maybe_view(chunks), groups, eps)
    return grads


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    input_bias: Tensor | None,
    stats: Tensor,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor, input_bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    y = reference.group_norm_silu(x, weight, bias, groups=groups, eps=eps, input_bias=input_bias)
    return y, _stats(x, groups)


def _reference_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    input_bias: Tensor | None,
    stats: Tensor,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    pull: Any = torch.func.vjp(
        lambda *given: reference.group_norm_silu(*given, groups=groups, eps=eps, input_bias=input_bias),
        x,
        weight,
        bias,
    )[1]
    grads = _fake_backward(grad, x, weight, bias, input_bias, stats, groups, eps)
    for target, value in zip(grads, pull(grad), strict=True):
        target.copy_(value)
    return grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.options = inputs[4:]


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    given = (*ctx.saved_tensors, *ctx.options)
    grads = torch.ops.var_ext.group_norm_silu_backward.default(grad, *given)
    added = grads[0].sum((0, 2, 3)) if ctx.needs_input_grad[3] else None
    return *grads, added, None, None


implement(
    "group_norm_silu",
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, Tensor? input_bias, int groups, float eps)"
    " -> (Tensor, Tensor)",
    native=_native,
    fallback=_reference,
    fake=lambda x, weight, bias, input_bias, groups, eps: (_empty(x), _stats(x, groups)),
    float64=False,
)
implement(
    "group_norm_silu",
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? input_bias, Tensor stats,"
    " int groups, float eps) -> (Tensor, Tensor, Tensor)",
    native=_native_backward,
    fallback=_reference_backward,
    fake=_fake_backward,
    float64=False,
)
differentiate("group_norm_silu", _gradient, _setup_context)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int = 32,
    eps: float = 1e-6,
    input_bias: Tensor | None = None,
) -> Tensor:
    """SiLU(GroupNorm(x + input_bias)), statistics in float32 (VQGAN's normalization, arXiv 2012.09841).

    Args:
        x: (B, C, H, W), float32, bfloat16, float16 or float64; contiguous or channels-last.
        weight, bias: (C,), dtype of x.
        groups: number of groups, a divisor of C.
        eps: added to the variance.
        input_bias: (C,), dtype of x: the bias of the convolution that made x, added in float32; None: no bias.

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
    if input_bias is not None:
        check_shape(op, "input_bias", input_bias, "(C,)", channels)
    require(groups >= 1 and channels % groups == 0, op, f"groups must divide C = {channels}", groups)
    check_dtype(op, "x", x, FLOATS)
    check_together(op, x=x, weight=weight, bias=bias, input_bias=input_bias)
    if backend.current() == "reference":
        return reference.group_norm_silu(x, weight, bias, groups=groups, eps=eps, input_bias=input_bias)
    out: Tensor = torch.ops.var_ext.group_norm_silu.default(x, weight, bias, input_bias, groups, eps)[0]
    return out
