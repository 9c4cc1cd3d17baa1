"""Reference of `bias_residual`."""

from __future__ import annotations

import torch
from torch import Tensor


def bias_residual(h: Tensor, x: Tensor, bias: Tensor, *, in_place: bool = False) -> Tensor:
    """h + bias + x: (B, C, H, W), (B, C, H, W), (C,) -> (B, C, H, W)."""
    h, x, bias = h.detach(), x.detach(), bias.detach()
    wide = torch.promote_types(h.dtype, torch.float32)
    y = h.to(wide) + bias.to(wide)[:, None, None] + x.to(wide)
    if in_place:
        return h.copy_(y)
    channels_last = h.is_contiguous(memory_format=torch.channels_last) and not h.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return y.to(h.dtype).contiguous(memory_format=layout)
