"""Reference of `group_norm_silu`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int = 32,
    eps: float = 1e-6,
    input_bias: Tensor | None = None,
) -> Tensor:
    """SiLU(GroupNorm(x + input_bias)): (B, C, H, W) -> (B, C, H, W)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide) if input_bias is None else x.to(wide) + input_bias.to(wide)[:, None, None]
    y = F.silu(F.group_norm(h, groups, weight.to(wide), bias.to(wide), eps)).to(x.dtype)
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
