"""Reference of `cached_attention`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from var_ext.reference.qk_norm import qk_norm


def cached_attention(
    qkv: Tensor,  # (B, l, 3, H, D)
    q_bias: Tensor,  # (H, D)
    v_bias: Tensor,  # (H, D)
    log_scale: Tensor | None,  # (H,)
    k_cache: Tensor,  # (B, Lmax, H, D)
    v_cache: Tensor,  # (B, Lmax, H, D)
    offset: int,
    *,
    scale: float = 1.0,
) -> Tensor:
    """qk_norm, with k and v to the cache from `offset` on; softmax(scale q k^T) v over all so far: (B, l, H, D)."""
    q, k, v = qk_norm(qkv, q_bias, v_bias, log_scale)
    end = offset + qkv.shape[1]
    k_cache[:, offset:end], v_cache[:, offset:end] = k, v
    q, k, v = (t.transpose(1, 2) for t in (q, k_cache[:, :end], v_cache[:, :end]))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()
