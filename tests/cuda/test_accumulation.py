"""What the matrix units add up in: sums whose terms cancel, exact in float32 and lost in anything narrower."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.cuda.attention import cached
from tests.cuda.conftest import Gpu
from tests.ops import oracle
from var_ext import ScaleSchedule, ops

LARGE, SMALL = 2.0**15, 2.0**-8  # 24 binary digits apart: all that float32 has
SCHEDULE = ScaleSchedule((16,))  # 256 tokens that see each other
SHAPE = (1, 256, 1, 64)


def cut_off(value: float, digits: int) -> float:
    """So many binary digits of a value, the others dropped."""
    part, exponent = math.frexp(value)
    return math.ldexp(math.trunc(math.ldexp(part, digits)), exponent - digits)


@pytest.mark.parametrize(("digits", "result"), [(24, 254 * SMALL), (23, 0.0), (14, 0.0)])
def test_narrower_sums_would_be_noticed(digits: int, result: float) -> None:
    total = 0.0
    for value in [LARGE, *[SMALL] * 254, -LARGE]:
        total = cut_off(total + value, digits)
    assert total == result


def tolerance(dtype: torch.dtype) -> float:
    """Of the result's own rounding, and of exponentials that are good to 22 digits."""
    return max(2 * torch.finfo(dtype).eps, 2e-6)


def attend(gpu: Gpu, op: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if op == "cached_attention":
        return cached(gpu, q, k, v, 256)
    return ops.block_causal_attention(gpu(q), gpu(k), gpu(v), SCHEDULE).cpu()


@pytest.mark.parametrize("op", ["cached_attention", "block_causal_attention"])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_small_values_outlive_large_ones_that_cancel(gpu: Gpu, op: str, dtype: torch.dtype) -> None:
    """Equal weights, values 2^15, 254 times 2^-8, -2^15: with 23 digits each small one would be cut off."""
    q, k = torch.zeros(SHAPE, dtype=dtype), torch.ones(SHAPE, dtype=dtype)
    v = torch.full(SHAPE, SMALL, dtype=dtype)
    v[:, 0], v[:, -1] = LARGE, -LARGE
    exact = oracle.attention(q.double(), k.double(), v.double(), 1.0)
    torch.testing.assert_close(exact[0, 0, 0, 0].item(), 254 * SMALL / 256, rtol=1e-6, atol=0)
    torch.testing.assert_close(attend(gpu, op, q, k, v), exact.to(dtype), rtol=tolerance(dtype), atol=0)


@pytest.mark.parametrize("op", ["cached_attention", "block_causal_attention"])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_small_products_outlive_large_ones_that_cancel(gpu: Gpu, op: str, dtype: torch.dtype) -> None:
    """q k^T of half the keys is 2^15 + 62 * 2^-8 - 2^15 = 0.24, of the others 0: weights that differ, or do not."""
    q = torch.ones(SHAPE, dtype=dtype)
    k = torch.zeros(SHAPE, dtype=dtype)
    k[:, ::2] = SMALL
    k[:, ::2, :, 0], k[:, ::2, :, -1] = LARGE, -LARGE
    v = torch.zeros(SHAPE, dtype=dtype)
    v[:, ::2] = 1
    exact = oracle.attention(q.double(), k.double(), v.double(), 1.0)
    assert exact.min() > 0.56  # 0.5 if the small ones were lost
    result = attend(gpu, op, q, k, v)
    torch.testing.assert_close(result, exact.to(dtype), rtol=tolerance(dtype), atol=0)
