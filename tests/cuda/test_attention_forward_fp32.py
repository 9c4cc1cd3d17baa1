from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.attention import CASES, HEAD_SIZES, by_formula, cached, far_apart, moved
from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.ops import oracle
from tests.ops.test_block_causal_attention import packed
from tests.ops.test_cached_attention import inputs, unnormed
from var_ext import ScaleSchedule, ops
from var_ext.ops._native import kernels, maybe_view, view
from var_ext.schedule import SCALES_256

LENGTHS = (1, 5, 65, 129, 151)


def attend(gpu: Gpu, given: list[Tensor], schedule: ScaleSchedule, scale: float = 1.0) -> Tensor:
    return ops.block_causal_attention(*(gpu(t) for t in given), schedule, scale=scale).cpu()


def exact(given: list[Tensor], schedule: ScaleSchedule, scale: float) -> Tensor:
    return by_formula([t.double() for t in given], given[0].double(), schedule, scale)[0]


@pytest.mark.parametrize(("schedule", "dim"), CASES, ids=str)
@pytest.mark.parametrize("heads", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_against_float64(gpu: Gpu, schedule: ScaleSchedule, dim: int, heads: int) -> None:
    given, scale = packed(2, schedule.num_tokens, heads, dim), 0.7 - heads % 3
    result = attend(gpu, given, schedule, scale)
    assert result.is_contiguous()
    torchs = oracle.attention(*given, scale, oracle.sees(schedule))
    oracle.assert_as_good_as_torch(result, torchs, exact(given, schedule, scale))


def test_all_scales_of_256_px(gpu: Gpu) -> None:
    schedule = ScaleSchedule(SCALES_256)
    given = packed(1, 680, 1, 64)
    torchs = oracle.attention(*given, 1.0, oracle.sees(schedule))
    oracle.assert_as_good_as_torch(attend(gpu, given, schedule), torchs, exact(given, schedule, 1.0))


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("queries", [1, 4, 17, 64, 130])
def test_against_a_cache(gpu: Gpu, queries: int, dim: int) -> None:
    """The rest of the cache is NaN: it is not read."""
    for length in (n for n in LENGTHS if n >= queries):
        q, keys, values = inputs(2, queries, 155, 2, dim)
        keys[:, length:], values[:, length:] = torch.nan, torch.nan
        seen = keys[:, :length], values[:, :length]
        truth = oracle.attention(q.double(), seen[0].double(), seen[1].double(), 0.7)
        result = cached(gpu, q, keys, values, length, 0.7)
        oracle.assert_as_good_as_torch(result, oracle.attention(q, *seen, 0.7), truth)


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("chip", ["86", "90"])
def test_chips(gpu: Gpu, chip: str, dim: int) -> None:
    """Products are cut smaller where a block has 99 KB."""
    schedule = oracle.ODD[151]
    given = packed(1, 151, 2, dim)
    q, keys, values = inputs(1, 130, 155, 2, dim)
    with gpu.of_chip(chip):
        result, of_cache = attend(gpu, given, schedule, 0.7), cached(gpu, q, keys, values, 151, 0.7)
    torchs = oracle.attention(*given, 0.7, oracle.sees(schedule))
    oracle.assert_as_good_as_torch(result, torchs, exact(given, schedule, 0.7))
    seen = q, keys[:, :151], values[:, :151]
    truth = oracle.attention(*(t.double() for t in seen), 0.7)
    oracle.assert_as_good_as_torch(of_cache, oracle.attention(*seen, 0.7), truth)


@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_the_end_of_memory(gpu: Gpu, dim: int) -> None:
    """Nothing is read behind the last key or query; behind the last result nothing changes."""
    q, keys, values = (t[0, :, 0] for t in inputs(1, 17, 70, 1, dim))
    room = gpu(torch.full((64, dim), 7.0))
    out = room[None, :17, None]
    given = [t[None, :, None] for t in (q, keys, values)]
    *placed, offset = moved(gpu, unnormed(*given, 70))
    kernels(out).cached_attention(*map(maybe_view, placed), view(out), offset, 1.0)
    oracle.assert_equal_up_to_rounding(out.cpu(), oracle.attention(*(t.double() for t in given), 1.0))
    assert (room[17:] == 7).all()


@pytest.mark.parametrize("sides", [(1, 2, 3, 4, 11), (8,), (1, 8, 9)], ids=str)
def test_log_sum_exp(gpu: Gpu, sides: tuple[int, ...]) -> None:
    schedule = ScaleSchedule(sides)
    given = packed(2, schedule.num_tokens, 3, 32)
    q, k, v = (gpu(t) for t in given)
    _, lse = torch.ops.var_ext.block_causal_attention(q, k, v, list(sides), 0.5)
    scores = torch.einsum("blhd,bmhd->bhlm", given[0].double(), given[1].double()) * 0.5
    truth = scores.masked_fill(~oracle.sees(schedule), -torch.inf).logsumexp(-1)
    oracle.assert_equal_up_to_rounding(lse.cpu(), truth)


def test_no_weights_at_scale_zero(gpu: Gpu) -> None:
    q, keys, values = inputs(1, 5, 80, 1, 32)
    result = cached(gpu, q, keys, values, 70, 0.0)
    torch.testing.assert_close(result, values[:, :70].mean(dim=1, keepdim=True).expand(1, 5, 1, 32))


def test_large_scores_do_not_overflow(gpu: Gpu) -> None:
    q, keys, values = inputs(1, 5, 80, 1, 32)
    truth = oracle.attention(q.double() * 100, keys.double() * 100, values.double(), 1.0)
    # scores near 1e4 carry a rounding error of 1e-3, which the exponential passes on
    result = cached(gpu, q * 100, keys * 100, values, 80).double()
    torch.testing.assert_close(result, truth, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_infinite_scores(gpu: Gpu, scale: float) -> None:
    """A score of -inf weighs nothing, even if the first tiles are so; without any other, torch has NaN."""
    q, keys, values = inputs(1, 5, 200, 1, 32)
    q[..., 0], keys[..., 0] = 1, 0
    keys[:, :130, :, 0] = -scale * torch.inf
    result = cached(gpu, q, keys, values, 200, scale)
    torch.testing.assert_close(result, cached(gpu, q, keys[:, 130:], values[:, 130:], 70, scale))
    assert cached(gpu, q, keys, values, 130, scale).isnan().all()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_not_lost(gpu: Gpu, which: int) -> None:
    """In what depends on it, and in nothing of a coarser scale or another head."""
    given = [t.contiguous() for t in packed(1, 146, 2, 32)]
    given[which][0, 100, 1, 3] = torch.nan
    hit = torch.zeros(146, 2, dtype=torch.bool)
    hit[100 if which == 0 else slice(65, 146), 1] = True
    assert torch.equal(attend(gpu, given, ScaleSchedule((1, 8, 9)))[0].isnan().any(-1), hit)


def test_more_heads_than_a_group(gpu: Gpu) -> None:
    """Blocks are ordered in groups of heads whose keys fit into the cache together: 16 here."""
    q, keys, values = inputs(1, 17, 2048, 17, 32)
    truth = oracle.attention(q.double(), keys.double(), values.double(), 1.0)
    oracle.assert_equal_up_to_rounding(cached(gpu, q, keys, values, 2048), truth)


def test_many_heads(gpu: Gpu) -> None:
    """On hardware beyond 65535, which a second axis of a grid could not have."""
    heads = 300 if gpu.level == "emulated" else 65537
    q, keys, values = inputs(1, 2, 3, heads, 32)
    truth = oracle.attention(q.double(), keys.double(), values.double(), 1.0)
    oracle.assert_equal_up_to_rounding(cached(gpu, q, keys, values, 3), truth)


def test_offsets_beyond_32_bits(gpu: Gpu) -> None:
    if gpu.level != "emulated":
        pytest.skip("moves 32 GB, of which the emulator touches a few pages")
    near = unnormed(*inputs(2, 5, 7, 2, 32), 7)
    apart = [far_apart(t) if isinstance(t, Tensor) and t.ndim > 2 else t for t in near]
    assert torch.equal(ops.cached_attention(*apart), ops.cached_attention(*near))
    assert all(torch.equal(apart[i], near[i]) for i in (4, 5))


@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_the_order_of_threads_changes_no_bit(gpu: Gpu, dim: int) -> None:
    given, runs = packed(1, 151, 2, dim), []
    for seed in range(3):
        if gpu.level == "emulated":
            emulation.emulator().seed(seed)
        runs.append(attend(gpu, given, oracle.ODD[151]))
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("chip", ["80", "86"])
def test_no_bank_conflicts(traced: Gpu, chip: str, dim: int) -> None:
    with traced.of_chip(chip):
        attend(traced, packed(1, 129, 1, dim), oracle.ODD[129])
    assert traced.conflicts() == []
