"""The best this machine can do, measured in the same run: the limits used in the tables."""

from __future__ import annotations

from functools import partial

import torch
from case import Case

SHAPES = {
    "copy of 256 MiB": dict(kind="memory", size=1 << 26),
    "fp32 product of 2048 x 2048": dict(kind="compute", size=2048),
    "bf16 product of 2048 x 2048": dict(kind="compute", size=2048, dtype=torch.bfloat16),
}
SMOKE = dict(kind="compute", size=8)
COMPETITORS = ("torch",)


def case(kind: str, size: int, dtype: torch.dtype = torch.float32) -> Case:
    if kind == "memory":
        source, target = torch.randn(2, size)
        return Case({"torch": partial(target.copy_, source)}, bytes=2 * 4 * size)  # read and written
    a, b = torch.randn(2, size, size).to(dtype)
    return Case({"torch": partial(torch.mm, a, b)}, flops=2 * size**3)


def test_limits(run_case) -> None:
    run_case()
