"""From packed qkv to the q, k and v of attention: biases, L2 norm, scale per head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import FLOATS, check_dtype, check_shape, check_together
from var_ext.ops._native import kernels, maybe_view, rows, scratch, view
from var_ext.ops._registry import differentiate, implement


def _fake(qkv: Tensor, *_: object) -> Tensor:
    return torch.empty_like(qkv.select(2, 0), memory_format=torch.contiguous_format)


def _native(
    qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _fake(qkv), _fake(qkv), _fake(qkv)
    qkv, q_bias, v_bias = rows(qkv), rows(q_bias), rows(v_bias)
    kernels(qkv).qk_norm(
        view(qkv), view(q_bias), view(v_bias), maybe_view(log_scale), view(q), view(k), view(v)
    )
    return q, k, v


def _native_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv: Tensor,
    q_bias: Tensor,
    log_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = rows(grad_q), rows(grad_k), rows(grad_v), rows(qkv), rows(q_bias)
    grads = _fake_backward(grad_q, grad_k, grad_v, qkv, q_bias, log_scale)
    of_log_scale = None if log_scale is None else view(grads[3])
    batch, length, _, heads, channels = qkv.shape
    sums = scratch(qkv, _partials(batch * length, heads), heads, 2 * channels + 1)
    kernel: Any = kernels(qkv).qk_norm_backward
    kernel(*map(view, given), maybe_view(log_scale), *map(view, grads[:3]), of_log_scale, maybe_view(sums))
    return grads


def _partials(tokens: int, heads: int) -> int:
    """Number of token chunks of the CUDA kernel: gradients depend on it, so it is the same on all chips.

    Four heads per block, as in bfloat16 with 64 channels, give 16 blocks for each of 132 multiprocessors; but a chunk
    of fewer than 16 tokens would cost more than it computes.
    """
    return max(1, min(-(-tokens // 16), 2112 * 4 // max(heads, 4)))


def _fake_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor, q_bias: Tensor, log_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def empty(like: Tensor) -> Tensor:
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    of_log_scale = qkv.new_empty(0) if log_scale is None else empty(log_scale)
    return empty(qkv), empty(q_bias), empty(q_bias), of_log_scale


def _reference(
    qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = reference.qk_norm(qkv, q_bias, v_bias, log_scale)
    return _fake(qkv).copy_(q), _fake(qkv).copy_(k), _fake(qkv).copy_(v)  # k may be a view of qkv


def _reference_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor, q_bias: Tensor, log_scale: Tensor | None
) -> tuple[Tensor, ...]:
    v_bias = torch.zeros_like(q_bias)
    inputs = (qkv, q_bias, v_bias) if log_scale is None else (qkv, q_bias, v_bias, log_scale)
    pull: Any = torch.func.vjp(reference.qk_norm, *inputs)[1]
    grads = [grad.contiguous() for grad in pull((grad_q, grad_k, grad_v))]
    return (*grads, qkv.new_empty(0)) if log_scale is None else tuple(grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    qkv, q_bias, _, log_scale = inputs
    ctx.save_for_backward(qkv, q_bias, log_scale)


def _gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    qkv, q_bias, log_scale = ctx.saved_tensors
    *back, of_log_scale = torch.ops.var_ext.qk_norm_backward.default(*grads, qkv, q_bias, log_scale)
    return (*back, None if log_scale is None else of_log_scale)


implement(
    "qk_norm",
    "qk_norm(Tensor qkv, Tensor q_bias, Tensor v_bias, Tensor? log_scale) -> (Tensor, Tensor, Tensor)",
    native=_native,
    fallback=_reference,
    fake=lambda qkv, *_: (_fake(qkv), _fake(qkv), _fake(qkv)),
    float64=False,
)
implement(
    "qk_norm",
    "qk_norm_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor qkv, Tensor q_bias, Tensor? log_scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    native=_native_backward,
    fallback=_reference_backward,
    fake=_fake_backward,
    float64=False,
)
differentiate("qk_norm", _gradient, _setup_context)


def qk_norm(
    qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the biases of q and v (k has none), normalize q and k over D, scale q by exp(min(log_scale, log 100)).

    The QK L2 norm is that of all published models (paper, section 3.2, implementation details). Sampling uses
    `cached_attention`, which includes it.

    Args:
        qkv: (B, L, 3, H, D), float32, bfloat16, float16 or float64.
        q_bias, v_bias: (H, D), dtype of qkv.
        log_scale: (H,), or None: no norm and no scale.

    Returns:
        q, k, v: (B, L, H, D) each, contiguous.

    Raises:
        ValueError: shapes do not match, or tensors lie on different devices.
        TypeError: dtypes differ or are not supported.
    """
    op = "qk_norm"
    check_shape(op, "qkv", qkv, "(B, L, 3, H, D)", None, None, 3, None, None)
    heads, channels = qkv.shape[3:]
    check_shape(op, "q_bias", q_bias, "(H, D)", heads, channels)
    check_shape(op, "v_bias", v_bias, "(H, D)", heads, channels)
    if log_scale is not None:
        check_shape(op, "log_scale", log_scale, "(H,)", heads)
    check_dtype(op, "qkv", qkv, FLOATS)
    check_together(op, qkv=qkv, q_bias=q_bias, v_bias=v_bias, log_scale=log_scale)
    if backend.current() == "reference":
        return reference.qk_norm(qkv, q_bias, v_bias, log_scale)
    return torch.ops.var_ext.qk_norm.default(qkv, q_bias, v_bias, log_scale)
