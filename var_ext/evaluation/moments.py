"""Mean and covariance of features that come in batches."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean and unbiased covariance of features (B, D) that come in batches, in float64.

    Sums are taken about the first batch's mean, so that squares of what lies near it keep their digits.
    """

    def __init__(self) -> None:
        self.count, self.first, self.second = 0, torch.zeros(()), torch.zeros(())

    def add(self, features: Tensor) -> None:
        """Counts (B, D) in; an empty batch changes nothing."""
        x = features.double().cpu()
        if not len(x):
            return
        if self.count == 0:
            self.origin = x.mean(0)
        x = x - self.origin
        self.count += len(x)
        self.first, self.second = self.first + x.sum(0), self.second + x.T @ x

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """(D,), (D, D) of all that came.

        Raises:
            ValueError: fewer than two rows came, or one that is not finite.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        mean = self.first / self.count
        centred = self.second - self.count * torch.outer(mean, mean)
        if not torch.isfinite(centred).all():
            raise ValueError("features must be finite, got NaN or infinity")
        return self.origin + mean, centred / (self.count - 1)
