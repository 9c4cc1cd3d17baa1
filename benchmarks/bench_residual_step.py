"""residual_step of eight 256 px images: a coarse scale, a fine one, and the last."""

from __future__ import annotations

import torch
from contest import Contest, compiled, nbytes

from var_ext import ops, reference

SHAPES = {
    "8 x 32 x 16 x 16, scale 2 -> 3": dict(batch=8, channels=32, side=16, scale=2, following=3),
    "8 x 32 x 16 x 16, scale 13 -> 16": dict(batch=8, channels=32, side=16, scale=13, following=16),
    "8 x 32 x 16 x 16, last": dict(batch=8, channels=32, side=16, scale=16, following=None),
}
SMOKE = dict(batch=1, channels=4, side=5, scale=2, following=3)
COMPETITORS = ("var_ext", "reference", "torch.compile")


def contest(batch: int, channels: int, side: int, scale: int, following: int | None) -> Contest:
    f_hat, embedding = torch.randn(batch, channels, side, side), torch.randn(batch, channels, scale, scale)
    weight, bias = torch.randn(channels, channels, 3, 3) * 0.05, torch.randn(channels) * 0.05
    arguments = (f_hat, embedding, weight, bias)
    return Contest(
        {
            "var_ext": lambda: ops.residual_step(*arguments, next_size=following),
            "reference": lambda: reference.residual_step(*arguments, next_size=following),
            "torch.compile": compiled(reference.residual_step, *arguments, next_size=following),
        },
        bytes=nbytes(*arguments, f_hat) + (batch * channels * following * following * 4 if following else 0),
        flops=2 * batch * side * side * channels * channels * 9,
    )


def test_residual_step(race) -> None:
    race()
