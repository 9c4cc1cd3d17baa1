"""Small modules of the transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """`nn.Dropout` with 16 random bits an element on the CPU: torch draws a number for each there, on one thread.

    The rate is rounded to a multiple of 2^-16.
    """

    def forward(self, x: Tensor) -> Tensor:
        kept = round((1 - self.p) * 2**16)  # of 2^16
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if not self.training or self.inplace or x.device.type != "cpu" or kept in (0, 2**16) or traced:
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        mask = bits.view(torch.int16)[: x.numel()].view(x.shape) < kept - 2**15
        return (x * mask).mul_(2**16 / kept)


class DropPath(nn.Module):
    """Stochastic depth: drops the residual branch of whole samples by zeroing its gate (B, C)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, gate: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return gate
        kept = gate.new_empty(gate.shape[0], 1).bernoulli_(1 - self.rate)
        return gate * kept / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"
