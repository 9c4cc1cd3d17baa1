"""Spectral normalisation (arXiv 1802.05957) whose power iteration is run once a step, however often the layers are.

torch's own runs one in every forward pass, so weights would depend on how many micro-batches a step has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

FIRST = 15  # iterations at the start
EPS = 1e-12


class Spectral(nn.Module):
    """A weight (N, ...) over its largest singular value as (N, M)."""

    left: Tensor
    right: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows = weight.detach().flatten(1)
        self.register_buffer("left", F.normalize(torch.randn(rows.shape[0]), dim=0, eps=EPS))
        self.register_buffer("right", F.normalize(torch.randn(rows.shape[1]), dim=0, eps=EPS))
        for _ in range(FIRST):
            self.iterate(weight)

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        rows = weight.flatten(1)
        self.right.copy_(F.normalize(rows.T @ self.left, dim=0, eps=EPS))
        self.left.copy_(F.normalize(rows @ self.right, dim=0, eps=EPS))

    def forward(self, weight: Tensor) -> Tensor:
        # copies: the graph of a step keeps the vectors it was computed with
        left, right = self.left.clone(), self.right.clone()
        return weight / (left @ (weight.flatten(1) @ right))


def normalise(module: nn.Module) -> nn.Module:
    """Give every convolution and linear layer inside a spectral norm; returns the module."""
    for layer in list(module.modules()):
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(layer, "weight", Spectral(layer.weight))
    return module


def iterate(module: nn.Module) -> None:
    """A power iteration of every spectral norm inside, with the weights as they are now."""
    for layer in module.modules():
        if isinstance(layer, parametrize.ParametrizationList):
            for part in layer:
                if isinstance(part, Spectral):
                    part.iterate(layer.original.detach())
