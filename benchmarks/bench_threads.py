"""One thread pool: alternating these ops with torch's own costs the sum of both.

Two pools would compete for cores: while one works, the threads of the other still spin.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness.case import Case

from var_ext import ops

SHAPES = {"adaln 2 x 256 x 1024 and a product of 512 x 512, 20 each": dict(length=256, size=512, rounds=20)}
SMOKE = dict(length=2, size=8, rounds=2)


def case(length: int, size: int, rounds: int) -> Case:
    x, (scale, shift) = torch.randn(2, length, 1024), torch.randn(2, 2, 1024)
    a, b = torch.randn(2, size, size)

    def op() -> torch.Tensor:
        return ops.adaln(x, scale, shift)

    def product() -> torch.Tensor:
        return a @ b

    def run(order: list[Callable[[], torch.Tensor]]) -> None:
        for call in order:
            call()

    return Case(
        {
            "in turns": lambda: run([op, product] * rounds),
            "apart": lambda: run([op] * rounds + [product] * rounds),
        }
    )
