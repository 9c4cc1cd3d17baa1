"""Reference of `adaln`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def adaln(
    x: Tensor,  # (B, L, C)
    scale: Tensor,  # (B, C)
    shift: Tensor,  # (B, C)
    *,
    branch: Tensor | None = None,  # (B, L, C)
    gate: Tensor | None = None,  # (B, C)
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(x) * (1 + scale) + shift, after x += gate * branch if a branch is given."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    if branch is not None and gate is not None:
        h = h + gate.to(wide)[:, None] * branch.to(wide)  # (B, L, C)
    normed = F.layer_norm(h, h.shape[-1:], eps=eps)
    y = (normed * (1 + scale.to(wide)[:, None]) + shift.to(wide)[:, None]).to(x.dtype)
    return y if branch is None else (h.to(x.dtype), y)
