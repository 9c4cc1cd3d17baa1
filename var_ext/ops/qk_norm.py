"""From packed qkv to the q, k and v of attention: biases, L2 norm, scale a head; in sampling into the cache."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import FLOATS, check_dtype, check_shape, check_together, require
from var_ext.ops._native import kernels, maybe_view, rows, scratch, view
from var_ext.ops._registry import differentiate, implement

Cache = tuple[Tensor, Tensor]


def _fake(qkv: Tensor, *_: object) -> Tensor:
    return torch.empty_like(qkv.select(2, 0), memory_format=torch.contiguous_format)


def _native(
    qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    k, v = _fake(qkv), _fake(qkv)
    return _native_into_cache(qkv, q_bias, v_bias, log_scale, k, v, 0), k, v


def _native_into_cache(
    qkv: Tensor,
    q_bias: Tensor,
    v_bias: Tensor,
    log_scale: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    offset: int,
) -> Tensor:
    run = kernels(qkv).qk_norm
    qkv, q_bias, v_bias, q = rows(qkv), rows(q_bias), rows(v_bias), _fake(qkv)
    if k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        k, v = _fake(qkv), _fake(qkv)
        run(view(qkv), view(q_bias), view(v_bias), maybe_view(log_scale), view(q), view(k), view(v), 0)
        k_cache.narrow(1, offset, k.shape[1]).copy_(k)
        v_cache.narrow(1, offset, v.shape[1]).copy_(v)
        return q
    run(
        view(qkv), view(q_bias), view(v_bias), maybe_view(log_scale),
        view(q), view(k_cache), view(v_cache), offset,
    )  # fmt: skip
    if not k_cache.is_inference():  # autograd has to see the change
        torch.autograd.graph.increment_version((k_cache, v_cache))
    return q


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
    """How many chunks of tokens the CUDA kernel sums up one by one: gradients depend on it, so it knows no chip.

    Four heads a block, as in bfloat16 with 64 channels, make 16 blocks for each of 132 multiprocessors; but a chunk of
    fewer than 16 tokens would cost more than it computes.
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


def _reference_into_cache(
    qkv: Tensor,
    q_bias: Tensor,
    v_bias: Tensor,
    log_scale: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    offset: int,
) -> Tensor:
    q = reference.qk_norm(qkv, q_bias, v_bias, log_scale, cache=(k_cache, v_cache), offset=offset)
    assert isinstance(q, Tensor)  # with a cache, q alone
    return _fake(qkv).copy_(q)


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
    "qk_norm_into_cache(Tensor qkv, Tensor q_bias, Tensor v_bias, Tensor? log_scale, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, SymInt offset) -> Tensor",
    native=_native_into_cache,
    fallback=_reference_into_cache,
    fake=_fake,
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


@overload
def qk_norm(
    qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def qk_norm(
    qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor | None = None, *, cache: Cache, offset: int
) -> Tensor: ...
def qk_norm(
    qkv: Tensor,
    q_bias: Tensor,
    v_bias: Tensor,
    log_scale: Tensor | None = None,
    *,
    cache: Cache | None = None,
    offset: int = 0,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Add the biases of q and v (k has none), normalize q and k over D, scale q by exp(min(log_scale, log 100)).

    The QK L2 norm is that of all published models (paper, section 3.2, implementation details). With a cache, k and v
    are written into it at [offset, offset + L) and only q is returned; that form has no gradient.

    Args:
        qkv: (B, L, 3, H, D), float32, bfloat16, float16 or float64.
        q_bias, v_bias: (H, D), dtype of qkv.
        log_scale: (H,), or None: no norm and no scale.
        cache: k and v cache, (B, Lmax, H, D) each, dtype of qkv; changed in place.
        offset: first entry of the cache to write.

    Returns:
        q, k, v, or q alone with a cache; (B, L, H, D) each.

    Raises:
        ValueError: shapes do not match, the cache is too short, or tensors lie on different devices.
        TypeError: dtypes differ or are not supported.
    """
    op = "qk_norm"
    check_shape(op, "qkv", qkv, "(B, L, 3, H, D)", None, None, 3, None, None)
    batch, length, _, heads, channels = qkv.shape
    check_shape(op, "q_bias", q_bias, "(H, D)", heads, channels)
    check_shape(op, "v_bias", v_bias, "(H, D)", heads, channels)
    if log_scale is not None:
        check_shape(op, "log_scale", log_scale, "(H,)", heads)
    check_dtype(op, "qkv", qkv, FLOATS)
    check_together(op, qkv=qkv, q_bias=q_bias, v_bias=v_bias, log_scale=log_scale)
    if cache is None:
        if backend.current() == "reference":
            return reference.qk_norm(qkv, q_bias, v_bias, log_scale)
        return torch.ops.var_ext.qk_norm.default(qkv, q_bias, v_bias, log_scale)

    k_cache, v_cache = cache
    check_shape(op, "k_cache", k_cache, "(B, Lmax, H, D)", batch, None, heads, channels)
    check_shape(op, "v_cache", v_cache, "(B, Lmax, H, D)", *k_cache.shape)
    check_together(op, qkv=qkv, k_cache=k_cache, v_cache=v_cache)
    room = k_cache.shape[1]
    require(0 <= offset <= room - length, op, f"offset must leave room for {length} tokens in {room}", offset)
    if torch.is_grad_enabled():
        if k_cache.requires_grad or v_cache.requires_grad:
            raise ValueError(f"{op}: caches must not require a gradient: nothing flows back through them")
        qkv, q_bias, v_bias = qkv.detach(), q_bias.detach(), v_bias.detach()
        log_scale = None if log_scale is None else log_scale.detach()
    if backend.current() == "reference":
        return reference.qk_norm(qkv, q_bias, v_bias, log_scale, cache=cache, offset=offset)
    return torch.ops.var_ext.qk_norm_into_cache.default(
        qkv, q_bias, v_bias, log_scale, k_cache, v_cache, offset
    )
