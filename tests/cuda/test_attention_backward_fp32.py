from __future__ import annotations

import pytest
import torch

from tests.cuda.attention import CASES, HEAD_SIZES, by_formula, far_apart, on
from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.ops import oracle
from tests.ops.test_block_causal_attention import packed
from var_ext import ScaleSchedule
from var_ext.schedule import SCALES_256


def assert_gradients(gpu: Gpu, schedule: ScaleSchedule, heads: int, dim: int, scale: float) -> None:
    """As of the CPU's kernels: weights come from a log-sum-exp that was rounded to float32, torch's do not."""
    given = packed(2 if heads > 1 else 1, schedule.num_tokens, heads, dim)
    grad = torch.randn(given[0].shape)
    truths = by_formula([t.double() for t in given], grad.double(), schedule, scale)
    for mine, truth in zip(on(gpu, given, grad, schedule, scale), truths, strict=True):
        oracle.assert_equal_up_to_rounding(mine, truth)


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("chip", ["86", "90"])
@pytest.mark.parametrize("length", [7, pytest.param(151, marks=pytest.mark.slow)])
def test_chips(gpu: Gpu, length: int, chip: str, dim: int) -> None:
    """Products are cut smaller where a block has 99 KB."""
    with gpu.of_chip(chip):
        assert_gradients(gpu, oracle.ODD[length], 2, dim, 0.7)


@pytest.mark.parametrize(("schedule", "dim"), CASES, ids=str)
@pytest.mark.parametrize("heads", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_against_float64(gpu: Gpu, schedule: ScaleSchedule, dim: int, heads: int) -> None:
    assert_gradients(gpu, schedule, heads, dim, 0.7 - heads % 3)


def test_all_scales_of_256_px(gpu: Gpu) -> None:
    assert_gradients(gpu, ScaleSchedule(SCALES_256), 1, 64, 1.0)


def test_gradient_of_a_sum(gpu: Gpu) -> None:
    """It is one number, expanded."""
    given, schedule = packed(1, 7, 2, 32), oracle.ODD[7]
    results = on(gpu, given, torch.ones(1).expand(1, 7, 2, 32), schedule)
    for result, expected in zip(results, on(gpu, given, torch.ones(1, 7, 2, 32), schedule), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_not_lost(gpu: Gpu, which: int) -> None:
    """In what depends on it, and in nothing of a coarser scale or another head."""
    given = [t.contiguous() for t in packed(1, 146, 2, 32)]
    given[which][0, 100, 1, 3] = torch.nan
    _, dq, dk, dv = on(gpu, given, torch.ones_like(given[0]), ScaleSchedule((1, 8, 9)))
    hit = torch.zeros(146, dtype=torch.bool)
    hit[100 if which == 0 else slice(65, 146)] = True
    assert not torch.stack([dq, dk, dv])[:, 0, :, 0].isnan().any()
    assert torch.equal(dq[0, :, 1].isnan().any(-1), hit)
    assert dk[0, :, 1].isnan().any(-1).all()  # each key is seen by that query


def test_infinite_keys(gpu: Gpu) -> None:
    """A key of -inf has no weight; where no query reaches its row, nothing of it gets into the gradients."""
    given = [t.contiguous() for t in packed(1, 70, 1, 32)]
    given[0][..., 0], given[1][:, 3, :, 0] = 1, -torch.inf
    schedule, grad = ScaleSchedule((1, 1, 2, 8)), torch.randn(1, 70, 1, 32)
    _, _, dk, dv = on(gpu, given, grad, schedule)
    _, _, dk_truth, dv_truth = by_formula([t.double() for t in given], grad.double(), schedule, 1.0)
    oracle.assert_equal_up_to_rounding(dv, dv_truth)
    oracle.assert_equal_up_to_rounding(dk, dk_truth)


def test_offsets_beyond_32_bits(gpu: Gpu) -> None:
    if gpu.level != "emulated":
        pytest.skip("moves 32 GB, of which the emulator touches a few pages")
    given, grad = [t.contiguous() for t in packed(2, 5, 2, 32)], torch.randn(2, 5, 2, 32)
    near = on(gpu, given, grad, ScaleSchedule((1, 2)))
    results = on(gpu, [far_apart(t) for t in given], far_apart(grad), ScaleSchedule((1, 2)))
    assert all(torch.equal(result, want) for result, want in zip(results, near, strict=True))


@pytest.mark.parametrize(
    "dim", [HEAD_SIZES[0], *(pytest.param(d, marks=pytest.mark.slow) for d in HEAD_SIZES[1:])]
)
def test_the_order_of_threads_changes_no_bit(gpu: Gpu, dim: int) -> None:
    given, runs = packed(1, 151, 2, dim), []
    for seed in range(3):
        if gpu.level == "emulated":
            emulation.emulator().seed(seed)
        runs.append(on(gpu, given, torch.ones_like(given[0]), oracle.ODD[151]))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("chip", ["80", "86"])
def test_no_bank_conflicts(traced: Gpu, chip: str, dim: int) -> None:
    given = packed(1, 129, 1, dim)
    with traced.of_chip(chip):
        on(traced, given, torch.ones_like(given[0]), oracle.ODD[129])
    assert traced.conflicts() == []
