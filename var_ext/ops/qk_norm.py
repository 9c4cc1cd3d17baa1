"""From packed qkv to the q, k and v of attention: biases, L2 norm, scale a head; in sampling into the cache."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import FLOATS, check_dtype, check_shape, check_together, require
from var_ext.ops._registry import compose, implement

Cache = tuple[Tensor, Tensor]


def _into_cache(
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
    return q


def _fake_into_cache(qkv: Tensor, *_: object) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], *qkv.shape[3:])


compose(
    "qk_norm(Tensor qkv, Tensor q_bias, Tensor v_bias, Tensor? log_scale) -> (Tensor, Tensor, Tensor)",
    reference.qk_norm,
)
implement(
    "qk_norm",
    "qk_norm_into_cache(Tensor qkv, Tensor q_bias, Tensor v_bias, Tensor? log_scale, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, SymInt offset) -> Tensor",
    native=None,
    fallback=_into_cache,
    fake=_fake_into_cache,
)


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
        return torch.ops.var_ext.qk_norm(qkv, q_bias, v_bias, log_scale)

    k_cache, v_cache = cache
    check_shape(op, "k_cache", k_cache, "(B, Lmax, H, D)", batch, None, heads, channels)
    check_shape(op, "v_cache", v_cache, "(B, Lmax, H, D)", *k_cache.shape)
    check_together(op, qkv=qkv, k_cache=k_cache, v_cache=v_cache)
    room = k_cache.shape[1]
    require(0 <= offset <= room - length, op, f"offset must leave room for {length} tokens in {room}", offset)
    qkv, q_bias, v_bias = qkv.detach(), q_bias.detach(), v_bias.detach()
    log_scale = None if log_scale is None else log_scale.detach()
    if backend.current() == "reference":
        return reference.qk_norm(qkv, q_bias, v_bias, log_scale, cache=cache, offset=offset)
    return torch.ops.var_ext.qk_norm_into_cache(qkv, q_bias, v_bias, log_scale, k_cache, v_cache, offset)
