"""What perceptual losses have in common: a frozen module that compares images, with a name and a digest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from var_ext.checkpoints.digests import digest_of_entries


class FrozenLoss(nn.Module, ABC):
    """A loss that is not trained: (output, images), (B, 3, S, S) in [-1, 1] -> (B,) float32, also under autocast.

    Attributes:
        name: what a run's recipe.json calls it.
    """

    name: str

    def freeze(self) -> None:
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Any:
        """Frozen: stays in evaluation mode."""
        return super().train(False)

    def digest(self) -> str | None:
        """Hex digest of the weights, None without any."""
        entries = self.state_dict()
        return digest_of_entries(entries) if entries else None

    def forward(self, output: Tensor, images: Tensor) -> Tensor:
        with torch.autocast(output.device.type, enabled=False):
            return self.compare(output.float(), images.float())

    @abstractmethod
    def compare(self, output: Tensor, images: Tensor) -> Tensor:
        """The loss in float32."""
