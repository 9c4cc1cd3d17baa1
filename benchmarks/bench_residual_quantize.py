"""residual_quantize: features of eight 256 px images to tokens, with the published codebook's size."""

from __future__ import annotations

import torch
from contest import Contest, agree, nbytes
from torch import Tensor

from var_ext import ScaleSchedule, ops, reference
from var_ext.schedule import SCALES_256

SHAPES = {
    f"{batch} x 32 x 16 x 16, 4096 codes": dict(batch=batch, channels=32, codes=4096, patch_nums=SCALES_256)
    for batch in (1, 8)
}
SMOKE = dict(batch=1, channels=4, codes=16, patch_nums=(1, 2, 3))
COMPETITORS = ("var_ext", "reference")
LAPS = 3  # slow enough to be steady


def mostly_equal(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Rounding may turn a near-tie, and with it the finer tokens of that place: a few of thousands."""
    equal = result[0] == expected[0]  # (B, L)
    share = equal.double().mean().item()
    assert share > 0.99, f"only {share:.2%} of the tokens agree with the reference"
    whole = equal.all(1)  # f_hat follows from the tokens
    agree(result[1][whole], expected[1][whole])


def contest(batch: int, channels: int, codes: int, patch_nums: tuple[int, ...]) -> Contest:
    schedule = ScaleSchedule(patch_nums)
    side = schedule.side
    features, codebook = torch.randn(batch, channels, side, side), torch.randn(codes, channels)
    weight, bias = torch.randn(4, channels, channels, 3, 3) * 0.05, torch.randn(4, channels) * 0.05
    phi_index = [k * 4 // len(schedule) for k in range(len(schedule))]
    arguments = (features, codebook, weight, bias, phi_index, schedule)
    search = 2 * batch * schedule.num_tokens * codes * channels
    convolutions = 2 * batch * len(schedule) * side * side * channels * channels * 9
    return Contest(
        {
            "var_ext": lambda: ops.residual_quantize(*arguments)[:2],
            "reference": lambda: reference.residual_quantize(*arguments)[:2],
        },
        bytes=nbytes(features, features, codebook, weight) + batch * schedule.num_tokens * 8,
        flops=search + convolutions,
        check=mostly_equal,
    )


def test_residual_quantize(race) -> None:
    race()
