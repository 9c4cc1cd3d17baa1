"""Means over the global batch, from the parts that ranks compute."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from var_ext.training.ranks import Ranks


class Means:
    """Named means over the rows of a batch, added up part by part. Every rank adds the same names in the same order.

    Args:
        names: of what will be added, needed where a rank may have no part.
    """

    def __init__(self, ranks: Ranks, device: torch.device, names: Iterable[str] = ()) -> None:
        self.ranks = ranks
        self.zero = torch.zeros((), dtype=torch.float64, device=device)
        self.sums = dict.fromkeys(names, self.zero)

    def add(self, share: float, **values: Tensor) -> None:
        """Add the means, () each, over a part with this `Part.share` of the batch."""
        for name, value in values.items():
            value = share / self.ranks.world * value.detach().double()
            self.sums[name] = self.sums.get(name, self.zero) + value

    def read(self) -> dict[str, float]:
        """The means over all rows; all ranks call this together."""
        if not self.sums:
            return {}
        sums = self.ranks.sum(torch.stack(list(self.sums.values())))
        return dict(zip(self.sums, sums.tolist(), strict=True))
