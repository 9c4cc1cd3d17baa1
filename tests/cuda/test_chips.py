"""Chips where a block has 99 KB of shared memory: nothing promised is refused, and no bit of 16 bits differs."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.attention import HEAD_SIZES, cached, on
from tests.cuda.conftest import Gpu
from tests.ops import oracle
from tests.ops.test_block_causal_attention import packed
from tests.ops.test_cached_attention import inputs
from tests.ops.test_residual_step import inputs as step_inputs
from var_ext import ops


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_16_bits(gpu: Gpu, dtype: torch.dtype, dim: int) -> None:
    schedule = oracle.ODD[151]
    given = [t.to(dtype) for t in packed(1, 151, 2, dim)]
    grad = torch.randn(given[0].shape).to(dtype)
    q, *keys_and_values = inputs(1, 130, 155, 2, dim, dtype)
    results = {}
    for chip in ("80", "86"):
        with gpu.of_chip(chip):
            of_cache = [cached(gpu, q[:, :n], *keys_and_values, 151, 0.7) for n in (64, 100, 130)]
            results[chip] = [*on(gpu, given, grad, schedule), *of_cache]
    assert all(torch.equal(mine, other) for mine, other in zip(*results.values(), strict=True))


@pytest.mark.parametrize(("chip", "most"), [("86", 480), ("80", 552)])
def test_channels_of_the_quantizer(gpu: Gpu, chip: str, most: int) -> None:
    if gpu.level != "emulated":
        pytest.skip("hardware is what it is")
    with gpu.of_chip(chip), gpu.sampled(1):
        ops.residual_step(*map(gpu, step_inputs(1, most, (1, 1), (1, 1))))
        with pytest.raises(ValueError, match=rf"got {most + 1}; VAR_EXT_BACKEND=reference takes any"):
            ops.residual_step(*map(gpu, step_inputs(1, most + 1, (1, 1), (1, 1))))
