"""Random numbers of a training pass as a pure function of keys, one a row of the batch, and of the place that draws.

However a batch is split over processes and micro-batches, each row then sees the same dropout, dropped paths and
dropped label. A model without keys draws from torch's generators, as published. The words are those of SplitMix64.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from var_ext.splitmix64 import GOLDEN, counter, mixed, signed, words

PLACE = 2**40  # words of one place and row: more than any layer draws


def row_keys(seed: int, rows: slice, device: torch.device | str = "cpu") -> Tensor:
    """Keys of the rows `start..stop` of a batch: (n,) int64."""
    return mixed(torch.arange(rows.start + 1, rows.stop + 1, device=device) * signed(GOLDEN) + signed(seed))


class Rows:
    """The keys of the batch that a model sees now, (B,) int64; all `Draws` of the model share them."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.keys = torch.empty(0, dtype=torch.int64, device=device)


class Draws:
    """The random numbers of one place in a model."""

    def __init__(self, rows: Rows, place: int) -> None:
        self.rows = rows
        # a tensor, so that layers that differ in nothing else are compiled once
        self.counter = counter(place * PLACE * GOLDEN, rows.keys.device)

    def of(self, keys: Tensor) -> Draws:
        """Those of the same place for rows with other keys, (N,) int64."""
        others = copy.copy(self)
        others.rows = Rows(keys.device)
        others.rows.keys = keys
        return others

    def uniform(self, count: int) -> Tensor:
        """(B, count) float32 in [0, 1)."""
        return (words(self.rows.keys, self.counter, count) & (2**24 - 1)).float() / 2**24


def key_rows(model: nn.Module, device: torch.device | str) -> Rows:
    """Let all that draws in a model, a module with a `draws`, draw by the keys of the returned `Rows`."""
    rows = Rows(device)
    drawing = [module for module in model.modules() if hasattr(type(module), "draws")]
    for place, module in enumerate(drawing):
        module.draws = Draws(rows, place)  # type: ignore[assignment]
    return rows
