"""Reference of `cached_attention`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def cached_attention(
    q: Tensor,  # (B, Lq, H, D)
    k_cache: Tensor,  # (B, Lmax, H, D)
    v_cache: Tensor,  # (B, Lmax, H, D)
    length: int,
    *,
    scale: float = 1.0,
) -> Tensor:
    """softmax(scale q k^T) v over the first `length` entries of the cache: (B, Lq, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k_cache[:, :length], v_cache[:, :length]))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()
