"""Attention of sampling: one scale's queries against the cache of all scales so far."""

from __future__ import annotations

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import FLOATS, check_dtype, check_shape, check_together, require
from var_ext.ops._native import kernels, rows, view
from var_ext.ops._registry import implement


def _native(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int, scale: float) -> Tensor:
    q, k_cache, v_cache = rows(q), rows(k_cache), rows(v_cache)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    kernels(q).cached_attention(view(q), view(k_cache), view(v_cache), view(out), length, scale)
    return out


def _fallback(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int, scale: float) -> Tensor:
    return reference.cached_attention(q, k_cache, v_cache, length, scale=scale)


implement(
    "cached_attention",
    "cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, SymInt length, float scale) -> Tensor",
    native=_native,
    fallback=_fallback,
    fake=lambda q, k_cache, v_cache, length, scale: q.new_empty(q.shape),
    float64=False,
)


def cached_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int, *, scale: float = 1.0
) -> Tensor:
    """softmax(scale q k^T) v over the first `length` entries of a cache; no mask (paper, section 3.2). No gradient.

    Args:
        q: (B, Lq, H, D), float32, bfloat16, float16 or float64, any strides.
        k_cache, v_cache: (B, Lmax, H, D), dtype of q.
        length: keys to attend to, 1 <= length <= Lmax.
        scale: factor on q k^T.

    Returns:
        (B, Lq, H, D), contiguous, dtype of q.

    Raises:
        ValueError: shapes do not match, length is out of range, or tensors lie on different devices.
        TypeError: dtypes differ or are not supported.
    """
    op = "cached_attention"
    check_shape(op, "q", q, "(B, Lq, H, D)", None, None, None, None)
    batch, _, heads, channels = q.shape
    check_shape(op, "k_cache", k_cache, "(B, Lmax, H, D)", batch, None, heads, channels)
    check_shape(op, "v_cache", v_cache, "(B, Lmax, H, D)", *k_cache.shape)
    require(1 <= length <= k_cache.shape[1], op, f"length must be in 1..{k_cache.shape[1]}", length)
    check_dtype(op, "q", q, FLOATS)
    check_together(op, q=q, k_cache=k_cache, v_cache=v_cache)
    q, k_cache, v_cache = q.detach(), k_cache.detach(), v_cache.detach()
    if backend.current() == "reference":
        return reference.cached_attention(q, k_cache, v_cache, length, scale=scale)
    return torch.ops.var_ext.cached_attention.default(q, k_cache, v_cache, length, scale)
