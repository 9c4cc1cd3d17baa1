"""SplitMix64 (Steele, Lea, Flood 2014): a counter hashed to 64 random bits.

In integer arithmetic that is the same on every device and compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def signed(value: int) -> int:
    """The 64-bit integer with the same bits."""
    return (value + 2**63) % 2**64 - 2**63


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x xor its logical right shift."""
    return x ^ ((x >> bits) & (2 ** (64 - bits) - 1))


def mixed(x: Tensor) -> Tensor:
    """The hash of each number, int64."""
    x = _shifted(x, 30) * signed(FACTORS[0])
    return _shifted(_shifted(x, 27) * signed(FACTORS[1]), 31)


def counter(first: int, device: torch.device | str = "cpu") -> Tensor:
    """Where a counter begins, and its step: (2,) int64.

    A tensor, although the step is always the same: compilers reason that a product with a constant does not overflow,
    and take loops over what does for short.
    """
    return torch.tensor([signed(first % 2**64), signed(GOLDEN)], device=device)


def words(keys: Tensor, counter: Tensor, count: int) -> Tensor:
    """mixed(key + first + step i), i = 1..count: (B,), (2,) -> (B, count), int64."""
    first, step = counter.unbind()
    return mixed(keys[:, None] + first + torch.arange(1, count + 1, device=keys.device) * step)
