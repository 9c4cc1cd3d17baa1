"""Losses and hits of tokens, added up over micro-batches and ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from var_ext import ops
from var_ext.schedule import ScaleSchedule
from var_ext.training.ranks import Ranks


def token_losses(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of every token: (B, L, V), (B, L) -> (B, L)."""
    return ops.cross_entropy(logits, targets, smoothing=smoothing)


class Tally:
    """Sums of losses and hits over rows, exact enough (float64) that their order does not show."""

    def __init__(self, schedule: ScaleSchedule, last: int, vocab_size: int, device: torch.device) -> None:
        self.slices, self.length = schedule.slices[: last + 1], schedule.num_tokens
        # losses and hits of each token, and in the first column the rows
        self.sums = torch.zeros(2, 1 + self.slices[-1].stop, dtype=torch.float64, device=device)
        self.seen = torch.zeros(last + 1, vocab_size, device=device)

    def add(self, losses: Tensor, found: Tensor, targets: Tensor) -> None:
        """Losses, likeliest and true codes of rows, (B, L') each."""
        self.sums[:, 0] += len(targets)
        self.sums[0, 1:] += losses.double().sum(0)
        self.sums[1, 1:] += (found == targets).double().sum(0)
        for k, where in enumerate(self.slices):
            self.seen[k, found[:, where].unique()] = 1

    def summary(self, ranks: Ranks, weights: Tensor | None = None) -> dict[str, Any]:
        """Over all ranks, which call this together: loss (nats per token), accuracy (%), and codes in use (%) by scale
        and, as "codes", by any.

        Args:
            weights: of the tokens, (L',); the sum of losses with them over all L tokens of the schedule is the
                "objective", what is trained. None leaves it out.
        """
        sums, seen = ranks.sum(self.sums), ranks.sum(self.seen) > 0
        loss, hit = sums[0, 1:] / sums[0, 0], 100 * sums[1, 1:] / sums[1, 0]  # (L',)
        tail = self.slices[-1]
        weighted = {} if weights is None else {"objective": float((loss * weights).sum()) / self.length}
        return {
            "loss": float(loss.mean()),
            **weighted,
            "loss_last": float(loss[tail].mean()),
            "accuracy": float(hit.mean()),
            "accuracy_last": float(hit[tail].mean()),
            "loss_scales": [float(loss[where].mean()) for where in self.slices],
            "accuracy_scales": [float(hit[where].mean()) for where in self.slices],
            "usage": (100 * seen.double().mean(1)).tolist(),
            "codes": float(100 * seen.any(0).double().mean()),
        }
