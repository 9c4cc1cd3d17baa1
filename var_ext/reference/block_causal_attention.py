"""Reference of `block_causal_attention`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from var_ext.schedule import ScaleSchedule


def block_causal_mask(schedule: ScaleSchedule, device: torch.device) -> Tensor:
    """(L, L) bool; True where a query (row) may see a key (column): keys of its own scale and all coarser ones."""
    scale_of = torch.cat(
        [torch.full((n,), k, dtype=torch.int32, device=device) for k, n in enumerate(schedule.lengths)]
    )
    return scale_of[:, None] >= scale_of[None, :]


def block_causal_attention(
    q: Tensor,  # (B, L, H, D)
    k: Tensor,  # (B, L, H, D)
    v: Tensor,  # (B, L, H, D)
    schedule: ScaleSchedule,
    *,
    scale: float = 1.0,
) -> Tensor:
    """softmax(scale q k^T + mask) v with a dense mask: (B, L, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, L, D)
    mask = block_causal_mask(schedule, q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).contiguous()  # (B, L, H, D)
