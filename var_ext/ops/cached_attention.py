"""Attention for sampling: a scale's qkv is normalized, appended to the cache, and attends to all scales so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import FLOATS, check_dtype, check_shape, check_together, require
from var_ext.ops._native import kernels, maybe_view, rows, view
from var_ext.ops._registry import implement


def _fake(qkv: Tensor, *_: object) -> Tensor:
    return torch.empty_like(qkv.select(2, 0), memory_format=torch.contiguous_format)


def _native(
    qkv: Tensor,
    q_bias: Tensor,
    v_bias: Tensor,
    log_scale: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    offset: int,
    scale: float,
) -> Tensor:
    out = _fake(qkv)
    qkv, q_bias, v_bias, k, v = rows(qkv), rows(q_bias), rows(v_bias), rows(k_cache), rows(v_cache)
    kernels(qkv).cached_attention(
        view(qkv),
        view(q_bias),
        view(v_bias),
        maybe_view(log_scale),
        view(k),
        view(v),
        view(out),
        offset,
        scale,
    )
    for cache, written in ((k_cache, k), (v_cache, v)):
        if written is not cache:  # a copy with rows that kernels can read
            new = slice(offset, offset + qkv.shape[1])
            cache[:, new] = written[:, new]
    if not k_cache.is_inference():  # autograd has to see the change
        torch.autograd.graph.increment_version((k_cache, v_cache))
    return out


def _fallback(*given: Any) -> Tensor:
    return reference.cached_attention(*given[:-1], scale=given[-1])


implement(
    "cached_attention",
    "cached_attention(Tensor qkv, Tensor q_bias, Tensor v_bias, Tensor? log_scale, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, SymInt offset, float scale) -> Tensor",
    native=_native,
    fallback=_fallback,
    fake=_fake,
    float64=False,
)


def cached_attention(
    qkv: Tensor,
    q_bias: Tensor,
    v_bias: Tensor,
    log_scale: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    offset: int,
    *,
    scale: float = 1.0,
) -> Tensor:
    """One scale of sampling: `qk_norm`, keys and values into the cache, softmax(scale q k^T) v over all so far.

    No mask: a scale sees itself and those before it (paper, section 3.2). No gradient.

    Args:
        qkv: (B, l, 3, H, D), float32, bfloat16, float16 or float64, any strides.
        q_bias, v_bias: (H, D), dtype of qkv.
        log_scale: (H,), dtype of qkv, or None: no norm and no scale of q, only biases.
        k_cache, v_cache: (B, Lmax, H, D), dtype of qkv, different memory; entries [offset, offset + l) are changed in
            place, those before are read.
        offset: filled entries, 0 <= offset <= Lmax - l.
        scale: factor on q k^T.

    Returns:
        (B, l, H, D), contiguous, dtype of qkv.

    Raises:
        ValueError: shapes do not match, the cache is too short or requires a gradient, or tensors lie on different
            devices.
        TypeError: dtypes differ or are not supported.
    """
    op = "cached_attention"
    check_shape(op, "qkv", qkv, "(B, l, 3, H, D)", None, None, 3, None, None)
    batch, length, _, heads, channels = qkv.shape
    check_shape(op, "q_bias", q_bias, "(H, D)", heads, channels)
    check_shape(op, "v_bias", v_bias, "(H, D)", heads, channels)
    if log_scale is not None:
        check_shape(op, "log_scale", log_scale, "(H,)", heads)
    check_shape(op, "k_cache", k_cache, "(B, Lmax, H, D)", batch, None, heads, channels)
    check_shape(op, "v_cache", v_cache, "(B, Lmax, H, D)", *k_cache.shape)
    room = k_cache.shape[1]
    require(0 <= offset <= room - length, op, f"offset must leave room for {length} tokens in {room}", offset)
    check_dtype(op, "qkv", qkv, FLOATS)
    check_together(
        op, qkv=qkv, q_bias=q_bias, v_bias=v_bias, log_scale=log_scale, k_cache=k_cache, v_cache=v_cache
    )
    if torch.is_grad_enabled():
        if k_cache.requires_grad or v_cache.requires_grad:
            raise ValueError(f"{op}: caches must not require a gradient: nothing flows back through them")
        qkv, q_bias, v_bias = qkv.detach(), q_bias.detach(), v_bias.detach()
        log_scale = None if log_scale is None else log_scale.detach()
    if backend.current() == "reference":
        return _fallback(qkv, q_bias, v_bias, log_scale, k_cache, v_cache, offset, scale)
    return torch.ops.var_ext.cached_attention.default(
        qkv, q_bias, v_bias, log_scale, k_cache, v_cache, offset, scale
    )
