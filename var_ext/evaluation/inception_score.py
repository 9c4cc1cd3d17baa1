"""Inception Score (arXiv 1606.03498), as ADM's evaluator computes it: chunks of 5000 in file order; and shuffled."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CHUNK = 5000
SEED = 2020  # of the shuffle: torch-fidelity's


class InceptionScore:
    """exp of the mean KL divergence between p(class | image) and the chunk's p(class), averaged over chunks.

    Args:
        count: images that will come.
        chunk: images of a chunk; the last may be smaller.
        shuffle: None for chunks in file order, or the seed of a shuffle.
    """

    def __init__(self, count: int, *, chunk: int = CHUNK, shuffle: int | None = None) -> None:
        self.count, self.chunks = count, -(-count // chunk)
        place = torch.arange(count)
        if shuffle is not None:
            drawn = np.random.RandomState(shuffle).permutation(count)  # image drawn[i] comes i-th
            place[torch.from_numpy(drawn)] = torch.arange(count)
        self._chunk = place // chunk  # (count,) of each image
        self._entropy = torch.zeros(self.chunks, dtype=torch.float64)
        self._sum: Tensor | None = None

    def add(self, first: int, logits: Tensor) -> None:
        """Counts in the images `first`, `first` + 1, ..., whose logits are (B, C)."""
        log_p = logits.double().cpu().log_softmax(1)
        p = log_p.exp()
        if self._sum is None:
            self._sum = p.new_zeros(self.chunks, p.shape[1])
        chunk = self._chunk[first : first + len(p)]
        self._sum.index_add_(0, chunk, p)
        # p log p, 0 where p is too small for a number
        self._entropy.index_add_(0, chunk, torch.where(p > 0, p * log_p, 0).sum(1))

    def value(self) -> float:
        """The score, at least 1.

        Raises:
            ValueError: no image came.
        """
        if self._sum is None:
            raise ValueError("an Inception Score needs images, got none")
        sizes = self._chunk.bincount(minlength=self.chunks).double()
        mean = self._sum / sizes[:, None]
        return float((self._entropy / sizes - mean.xlogy(mean).sum(1)).exp().mean())
