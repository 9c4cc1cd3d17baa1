"""Random numbers of a training pass as a pure function of keys, one a row of the batch, and of the place that draws.

However a batch is split over processes and micro-batches, each row then sees the same dropout, dropped paths and
dropped label. A model without keys draws from torch's generators, as published. The words are those of SplitMix64
(Steele, Lea, Flood 2014), a counter hashed, in integer arithmetic that is the same on every device and compiled.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

GOLDEN = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
PLACE = 2**40  # words of one place and row: more than any layer draws
PART = 2**15  # words that a thread hashes at once: they stay in its cache over all passes


def _signed(value: int) -> int:
    """The 64-bit integer with the same bits."""
    return (value + 2**63) % 2**64 - 2**63


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x xor its logical right shift."""
    return x ^ ((x >> bits) & (2 ** (64 - bits) - 1))


def _mixed(x: Tensor) -> Tensor:
    x = _shifted(x, 30) * _signed(FACTORS[0])
    return _shifted(_shifted(x, 27) * _signed(FACTORS[1]), 31)


def _mix(x: Tensor) -> None:
    """`_mixed` in place."""
    for bits, factor in zip((30, 27), FACTORS, strict=True):
        x ^= (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)
        x *= _signed(factor)
    x ^= (x >> 31).bitwise_and_(2**33 - 1)


def row_keys(seed: int, rows: slice, device: torch.device | str = "cpu") -> Tensor:
    """Keys of the rows `start..stop` of a batch: (n,) int64."""
    return _mixed(
        torch.arange(rows.start + 1, rows.stop + 1, device=device) * _signed(GOLDEN) + _signed(seed)
    )


class Rows:
    """The keys of the batch that a model sees now, (B,) int64; all `Draws` of the model share them."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.keys = torch.empty(0, dtype=torch.int64, device=device)


class Draws:
    """The random numbers of one place in a model."""

    def __init__(self, rows: Rows, place: int) -> None:
        self.rows = rows
        # tensors: layers that differ in nothing else are compiled once, and nothing folds what overflows on purpose
        self.first = torch.tensor(_signed(place * PLACE * GOLDEN % 2**64), device=rows.keys.device)
        self.golden = torch.tensor(_signed(GOLDEN), device=rows.keys.device)

    def of(self, keys: Tensor) -> Draws:
        """Those of the same place for rows with other keys, (N,) int64."""
        others = copy.copy(self)
        others.rows = Rows(keys.device)
        others.rows.keys = keys
        return others

    def words(self, count: int) -> Tensor:
        """(B, count) int64, 64 random bits each."""
        device = self.first.device
        part = PART * torch.get_num_threads()
        if torch.compiler.is_compiling() or device.type != "cpu" or count <= part:
            counter = torch.arange(1, count + 1, device=device) * self.golden
            return _mixed(self.rows.keys[:, None] + self.first + counter)
        found = torch.empty(len(self.rows.keys), count, dtype=torch.int64)
        counter = torch.arange(1, part + 1) * self.golden
        for row, first in zip(found, self.rows.keys + self.first, strict=True):
            for words in row.split(part):
                torch.add(counter[: len(words)], first, out=words)
                _mix(words)
                first = first + part * self.golden
        return found

    def uniform(self, count: int) -> Tensor:
        """(B, count) float32 in [0, 1)."""
        return (self.words(count) & (2**24 - 1)).float() / 2**24

    def halves(self, shape: torch.Size) -> Tensor:
        """int16 of a shape (B, ...), 16 random bits each."""
        count = shape.numel() // shape[0]
        words = self.words(-(-count // 4))
        if (
            torch.compiler.is_compiling()
        ):  # whose views of another dtype go wrong on a CPU: the same by arithmetic
            shifts = torch.arange(0, 64, 16, device=words.device)
            lanes = (words[..., None] >> shifts).to(torch.int16).flatten(1)
        else:
            lanes = words.view(torch.int16)
        return lanes[:, :count].reshape(shape)


def key_rows(model: nn.Module, device: torch.device | str) -> Rows:
    """Let all that draws in a model, a module with a `draws`, draw by the keys of the returned `Rows`."""
    rows = Rows(device)
    drawing = [module for module in model.modules() if hasattr(type(module), "draws")]
    for place, module in enumerate(drawing):
        module.draws = Draws(rows, place)  # type: ignore[assignment]
    return rows
