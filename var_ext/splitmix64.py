"""SplitMix64 (Steele, Lea, Flood 2014): a counter hashed to 64 random bits.

In integer arithmetic that is the same on every device and compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
INVERSE = pow(GOLDEN, -1, 2**64)


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


def words(keys: Tensor, first: Tensor, count: int) -> Tensor:
    """mixed(key + first + GOLDEN i), i = 1..count: (B,), () -> (B, count), int64.

    The counter is not multiplied alone: compilers take such a product for an index, which must not overflow.
    """
    begin = (keys + first) * signed(INVERSE)
    return mixed((begin[:, None] + torch.arange(1, count + 1, device=keys.device)) * signed(GOLDEN))
