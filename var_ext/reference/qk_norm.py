"""Reference of `qk_norm`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_LOG_SCALE = math.log(100.0)


def qk_norm(
    qkv: Tensor,  # (B, L, 3, H, D)
    q_bias: Tensor,  # (H, D)
    v_bias: Tensor,  # (H, D)
    log_scale: Tensor | None = None,  # (H,)
) -> tuple[Tensor, Tensor, Tensor]:
    """Biases on q and v, then L2 norm of q and k with a learned scale per head on q."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.to(wide).unbind(2)  # each (B, L, H, D)
    q, v = q + q_bias.to(wide), v + v_bias.to(wide)
    if log_scale is not None:
        q = F.normalize(q, dim=-1) * log_scale.to(wide).clamp_max(MAX_LOG_SCALE).exp()[:, None]
        k = F.normalize(k, dim=-1)
    return q.to(qkv.dtype), k.to(qkv.dtype), v.to(qkv.dtype)
