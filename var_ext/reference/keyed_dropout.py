"""Reference of `keyed_dropout`."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from var_ext import splitmix64


def keyed_dropout(x: Tensor, keys: Tensor, counter: Tensor, kept: int) -> Tensor:
    """x where 16 random bits of an element and its row are low, times 2^16 / kept: (B, ...), (B,), (2,) -> (B, ...)."""
    batch, *rest = x.shape
    if x.ndim == 4:  # pictures, in the order of channels last
        rest = [*rest[1:], rest[0]]
    words = splitmix64.words(keys, counter, -(-prod(rest) // 4))
    # by arithmetic: compiled views of another dtype go wrong on a CPU
    lanes = words[..., None] >> torch.arange(0, 64, 16, device=words.device)  # (B, words, 4)
    halves = lanes.to(torch.int16).flatten(1)[:, : prod(rest)].reshape(batch, *rest)
    if x.ndim == 4:
        halves = halves.permute(0, 3, 1, 2)
    return x * (halves < kept - 2**15) * (2**16 / kept)
