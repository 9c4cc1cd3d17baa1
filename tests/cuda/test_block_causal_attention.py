from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda.attention import by_formula, on
from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.ops import oracle
from tests.ops.test_block_causal_attention import packed, with_gradients
from var_ext import ScaleSchedule, ops, reference
from var_ext.ops._native import kernels, view
from var_ext.schedule import SCALES_256

# Tiles of one scale, of several, of parts of one; keys of less than a tile, of whole ones, of one more
SCHEDULES = [
    *oracle.ODD.values(),
    ScaleSchedule((8,)),
    ScaleSchedule((5, 5, 5, 5)),
    ScaleSchedule((1, 8, 9)),
    ScaleSchedule((1, 1, 13, 16)),
]
HALF = (torch.bfloat16, torch.float16)


def attend(gpu: Gpu, q: Tensor, k: Tensor, v: Tensor, schedule: ScaleSchedule, scale: float = 1.0) -> Tensor:
    return ops.block_causal_attention(gpu(q), gpu(k), gpu(v), schedule, scale=scale).cpu()


def assert_right(
    result: Tensor, q: Tensor, k: Tensor, v: Tensor, schedule: ScaleSchedule, scale: float
) -> None:
    """As near to float64 as torch is in the same dtype."""
    mask = oracle.sees(schedule)
    torchs = oracle.attention(q, k, v, scale, mask)
    oracle.assert_as_good_as_torch(
        result, torchs, oracle.attention(q.double(), k.double(), v.double(), scale, mask)
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: str(schedule.num_tokens))
@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("heads", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_against_float64(gpu: Gpu, schedule: ScaleSchedule, dtype: torch.dtype, heads: int) -> None:
    q, k, v = packed(2, schedule.num_tokens, heads, 64, dtype)
    result = attend(gpu, q, k, v, schedule, 0.7)
    assert result.is_contiguous()
    assert_right(result, q, k, v, schedule, 0.7)


@pytest.mark.parametrize("dim", [32, 128])
@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_each_head_size(gpu: Gpu, dim: int, dtype: torch.dtype, scale: float) -> None:
    q, k, v = packed(1, 151, 2, dim, dtype)
    assert_right(attend(gpu, q, k, v, oracle.ODD[151], scale), q, k, v, oracle.ODD[151], scale)


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_all_scales_of_256_px(gpu: Gpu, dtype: torch.dtype) -> None:
    q, k, v = packed(1, 680, 1, 64, dtype)
    schedule = ScaleSchedule(SCALES_256)
    assert_right(attend(gpu, q, k, v, schedule), q, k, v, schedule, 1.0)


@pytest.mark.parametrize("dtype", HALF)
def test_an_unchanged_maximum_does_not_decay(gpu: Gpu, dtype: torch.dtype) -> None:
    """One key outweighs all others by far, and ten tiles of keys come after it: its score alone is the log-sum-exp,
    rounded in the product and in the sum. A rounding error a tile would be up to seven times that."""
    schedule, scale = ScaleSchedule(SCALES_256), 1.3
    q, k, v = packed(1, 680, 1, 64, dtype)
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[0, :, 0, 0] = (torch.arange(680) % 128 + 128) / 16  # 8 to 16, exact in 8 bits
    k[0, 0, 0, 0] = 16
    _, lse = torch.ops.var_ext.block_causal_attention(
        gpu(q), gpu(k), gpu(v), list(schedule.patch_nums), scale
    )
    exact = q[0, :, 0, 0].double() * 16 * scale
    unit = 2.0 ** (exact.log2().floor() - 23)
    assert ((lse.cpu()[0, 0] - exact).abs() / unit).max() <= 2


@pytest.mark.parametrize(
    "schedule", [oracle.ODD[5], oracle.ODD[151], ScaleSchedule(SCALES_256)], ids=lambda s: str(s.num_tokens)
)
@pytest.mark.parametrize("dtype", HALF)
def test_gradients_through_the_op(gpu: Gpu, schedule: ScaleSchedule, dtype: torch.dtype) -> None:
    """As near to float64 as those of the reference; each backward kernel has tests of its own."""
    given = packed(1, schedule.num_tokens, 2 if schedule.num_tokens < 600 else 1, 64, dtype)
    grad = torch.randn(given[0].shape).to(dtype)
    torchs = with_gradients(
        partial(reference.block_causal_attention, schedule=schedule, scale=0.7), given, grad
    )
    truths = by_formula([t.double() for t in given], grad.double(), schedule, 0.7)
    for result, torchs_own, truth in zip(on(gpu, given, grad, schedule, 0.7), torchs, truths, strict=True):
        assert result.is_contiguous()
        oracle.assert_as_good_as_torch(result, torchs_own, truth)


@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("schedule", SCHEDULES[4:], ids=lambda schedule: str(schedule.num_tokens))
def test_large_tiles(gpu: Gpu, dim: int, dtype: torch.dtype, schedule: ScaleSchedule) -> None:
    """A grid that fills the chip takes tiles of twice the rows, with the same result."""
    q, k, v = packed(1, schedule.num_tokens, 1, dim, dtype)
    few = attend(gpu, q, k, v, schedule, -0.5)
    heads = 1 if gpu.level == "emulated" else 512
    with gpu.of_one_multiprocessor():
        q, k, v = (t.expand(2, -1, heads, -1) for t in (q, k, v))
        many = attend(gpu, q, k, v, schedule, -0.5)
    assert torch.equal(many, few.expand_as(many))


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("layout", ["unaligned", "heads first", "expanded", "strided"])
def test_memory(gpu: Gpu, layout: str, dtype: torch.dtype) -> None:
    """The same numbers elsewhere in memory give the same bits."""
    schedule = oracle.ODD[151]
    given = [t.contiguous() for t in packed(2, 151, 3, 32, dtype)]
    if layout == "expanded":
        given = [t[:1, :, :1].expand(2, -1, 3, -1) for t in given]
    placed = {
        "unaligned": oracle.unaligned,
        "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": lambda t: t,
        "strided": lambda t: torch.stack([t, -t], dim=-1)[..., 0],
    }[layout]
    expected = attend(gpu, *(t.contiguous() for t in given), schedule)
    assert torch.equal(attend(gpu, *(placed(t) for t in given), schedule), expected)


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_log_sum_exp(gpu: Gpu, dtype: torch.dtype) -> None:
    q, k, v = packed(2, 151, 3, 32, dtype)
    sides = list(oracle.ODD[151].patch_nums)
    _, lse = torch.ops.var_ext.block_causal_attention(gpu(q), gpu(k), gpu(v), sides, -0.5)
    scores = torch.einsum("blhd,bmhd->bhlm", q.double(), k.double()) * -0.5
    exact = scores.masked_fill(~oracle.sees(oracle.ODD[151]), -torch.inf).logsumexp(-1)
    oracle.assert_equal_up_to_rounding(lse.cpu(), exact)


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_not_lost(gpu: Gpu, which: int, dtype: torch.dtype) -> None:
    """NaN in one token of q, k or v: in what depends on it, and in no coarser tile or other head."""
    schedule = ScaleSchedule((1, 8, 9))
    given = [t.contiguous() for t in packed(1, 146, 2, 32, dtype)]
    given[which][0, 100, 1, 3] = torch.nan
    result = attend(gpu, *given, schedule)
    hit = torch.zeros(146, dtype=torch.bool)
    hit[100 if which == 0 else slice(65, 146)] = True
    assert torch.equal(result[0, :, 1].isnan().any(-1), hit)
    assert not result[:, :, 0].isnan().any()


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_large_and_infinite_scores(gpu: Gpu, dtype: torch.dtype) -> None:
    """Scores near 1e4 do not overflow; one of -inf weighs nothing, even if a whole tile of keys is so."""
    q, k, v = packed(1, 146, 1, 32, dtype)
    schedule = ScaleSchedule((1, 8, 9))
    one_hot = torch.zeros_like(q)
    one_hot[..., 0], one_hot[..., 1] = 100, 1
    result = attend(gpu, one_hot, k, v, schedule)
    exact = oracle.attention(one_hot.double(), k.double(), v.double(), 1.0, oracle.sees(schedule))
    torch.testing.assert_close(result.double(), exact, rtol=2e-2, atol=2e-2)

    k[:, :80, :, 0] = -torch.inf
    result = attend(gpu, one_hot, k, v, schedule)
    exact = oracle.attention(one_hot.double(), k.double(), v.double(), 1.0, oracle.sees(schedule))
    assert torch.equal(result.isnan(), exact.isnan())
    assert result[:, :65].isnan().all()
    torch.testing.assert_close(result.double(), exact, rtol=2e-2, atol=2e-2, equal_nan=True)


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_the_order_of_threads_changes_no_bit(gpu: Gpu, dtype: torch.dtype) -> None:
    q, k, v = packed(1, 151, 2, 64, dtype)
    runs = []
    for seed in range(3):
        if gpu.level == "emulated":
            emulation.emulator().seed(seed)
        runs.append(attend(gpu, q, k, v, oracle.ODD[151]))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def directly(gpu: Gpu, q: Tensor, k: Tensor, v: Tensor, schedule: ScaleSchedule, blocks: int) -> Tensor:
    """The kernel, of which the emulator runs only some blocks: NaN stays where none has been."""
    out = gpu(torch.full(q.shape, torch.nan, dtype=q.dtype))
    lse = gpu(torch.empty(q.shape[0], q.shape[2], q.shape[1]))
    with gpu.sampled(blocks):
        kernels(out).block_causal_attention(
            view(gpu(q)), view(gpu(k)), view(gpu(v)), view(out), view(lse), schedule.patch_nums, 1.0
        )
    return out.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_heads_than_a_grid_is_high(gpu: Gpu, dtype: torch.dtype) -> None:
    q, k, v = packed(65537, 1, 1, 32, dtype)
    wanted = torch.arange(65537.0).remainder(251).to(dtype)
    v[:, 0, 0, 0] = wanted
    result = directly(gpu, q, k, v, ScaleSchedule((1,)), 50)
    there = ~result[:, 0, 0, 0].isnan()
    assert there[0]
    assert there[-1]
    assert torch.equal(result[there][:, 0, 0, 0], wanted[there])


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_offsets_beyond_32_bits(gpu: Gpu, dtype: torch.dtype) -> None:
    if gpu.level != "emulated":
        pytest.skip("moves 4 GB and more, of which the emulator touches a few pages")
    given = [t.contiguous() for t in packed(2, 5, 2, 32, dtype)]
    far = 2**31

    def spread(x: Tensor) -> Tensor:
        place = torch.empty(far + x[0].numel(), dtype=x.dtype)
        return place.as_strided(x.shape, (far, *x.stride()[1:])).copy_(x)

    schedule = ScaleSchedule((1, 2))
    assert torch.equal(attend(gpu, *map(spread, given), schedule), attend(gpu, *given, schedule))


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_no_bank_conflicts(traced: Gpu, dim: int, dtype: torch.dtype) -> None:
    attend(traced, *packed(1, 151, 1, dim, dtype), oracle.ODD[151])
    assert traced.conflicts() == []


@pytest.mark.parametrize("sides", [(1,) * 300, (64, 64, 64, 64), (2, 90, 90)], ids=["many", "equal", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_long_schedules(gpu: Gpu, sides: tuple[int, ...], dtype: torch.dtype) -> None:
    """Up to 16384 tokens and hundreds of scales: some tiles, against all their keys."""
    schedule = ScaleSchedule(sides)
    length = schedule.num_tokens
    q, k, v = torch.randn(3, 1, length, 1, 32).div(2).to(dtype).unbind(0)
    result = directly(gpu, q, k, v, schedule, 3)[0, :, 0]
    there = (~result.isnan().any(-1)).nonzero()[:, 0]
    assert {0, length - 1} <= set(there.tolist())
    ends = torch.tensor([s.stop for s in schedule.slices for _ in range(s.stop - s.start)])
    for query in there[:: max(1, len(there) // 40)].tolist():
        weights = (q[0, query, 0].double() @ k[0, : ends[query], 0].double().T).softmax(0)
        exact = weights @ v[0, : ends[query], 0].double()
        torch.testing.assert_close(result[query].double(), exact, rtol=2e-2, atol=1e-3)


def test_refusals(gpu: Gpu) -> None:
    def refused(message: str, **change: Any) -> None:
        given = dict(
            zip("qkv", gpu(torch.zeros(3, 1, 5, 2, 32)).unbind(0), strict=True),
            schedule=ScaleSchedule((1, 2)),
        )
        with pytest.raises(ValueError, match=f"^block_causal_attention: {message}"):
            ops.block_causal_attention(**{**given, **change})

    few = gpu(torch.zeros(1, 5, 2, 20))
    refused("D must be 32, 64 or 128 on CUDA, got 20; VAR_EXT_BACKEND=reference", q=few, k=few, v=few)
    refused("q must have the L = 14 of the schedule, got 5", schedule=ScaleSchedule((1, 2, 3)))
    long = gpu(torch.zeros(1, 1, 1, 32)).expand(1, 513 * 128, 1, 32)
    refused(
        "patch_nums must make at most 512 tiles",
        q=long,
        k=long,
        v=long,
        schedule=ScaleSchedule((1,) * 513 * 128),
    )
    sides = tuple(range(1, 66))
    long = gpu(torch.zeros(1, 1, 1, 32)).expand(1, sum(n * n for n in sides), 1, 32)
    refused(
        "patch_nums must hold at most 64 different sides",
        q=long,
        k=long,
        v=long,
        schedule=ScaleSchedule(sides),
    )


def test_the_kernel_refuses_rows_off_16_bytes(gpu: Gpu) -> None:
    whole = gpu(torch.zeros(1, 5, 2, 33))
    odd, even, lse = whole[..., 1:], gpu(torch.zeros(1, 5, 2, 32)), gpu(torch.zeros(1, 2, 5))
    run = kernels(even).block_causal_attention
    for i, name in enumerate(("q", "k", "v")):
        given = [view(odd if i == j else even) for j in range(3)]
        with pytest.raises(
            ValueError, match=f"{name} must have rows that begin at multiples of 16 bytes on CUDA"
        ):
            run(*given, view(even), view(lse), [1, 2], 1.0)


def test_batch_of_none(gpu: Gpu) -> None:
    q, k, v = packed(0, 5, 2, 32)
    assert attend(gpu, q, k, v, ScaleSchedule((1, 2))).shape == (0, 5, 2, 32)
