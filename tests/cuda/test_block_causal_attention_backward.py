"""Gradients in bfloat16 and float16; those in float32 are in test_attention_backward_fp32.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.cuda.attention_fp32 import by_formula, far_apart, on
from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.ops import oracle
from tests.ops.test_block_causal_attention import packed
from var_ext import ScaleSchedule, reference
from var_ext.ops._native import kernels, maybe_view, view
from var_ext.schedule import SCALES_256

HALF = (torch.bfloat16, torch.float16)
# Tiles of one scale, of several, of parts of one; queries that begin in the middle of a tile of 64
SCHEDULES = [
    *oracle.ODD.values(),
    ScaleSchedule((8,)),
    ScaleSchedule((5, 5, 5, 5)),
    ScaleSchedule((1, 8, 9)),
    ScaleSchedule((1, 1, 13, 16)),
]


def assert_right(
    gpu: Gpu, schedule: ScaleSchedule, dim: int, heads: int, dtype: torch.dtype, scale: float
) -> None:
    """Result and gradients as near to float64 as those of torch in the same dtype."""
    given = packed(2 if heads > 1 else 1, schedule.num_tokens, heads, dim, dtype)
    grad = torch.randn(given[0].shape).to(dtype)
    results = on(gpu, given, grad, schedule, scale)
    op = partial(reference.block_causal_attention, schedule=schedule, scale=scale)
    leaves = [t.detach().requires_grad_() for t in given]
    out = op(*leaves)
    torchs = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    truths = by_formula([t.double() for t in given], grad.double(), schedule, scale)
    for result, torchs_own, truth in zip(results, torchs, truths, strict=True):
        assert result.is_contiguous()
        oracle.assert_as_good_as_torch(result, torchs_own, truth)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: str(schedule.num_tokens))
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("heads", [1, 3])
def test_against_float64(gpu: Gpu, schedule: ScaleSchedule, dtype: torch.dtype, heads: int) -> None:
    assert_right(gpu, schedule, 64, heads, dtype, 0.7)


@pytest.mark.parametrize("dim", [32, 128])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [-0.7, 0.0])
@pytest.mark.parametrize("length", [129, 151])
def test_each_head_size(gpu: Gpu, dim: int, dtype: torch.dtype, scale: float, length: int) -> None:
    assert_right(gpu, oracle.ODD[length], dim, 2, dtype, scale)


@pytest.mark.parametrize("dtype", HALF)
def test_all_scales_of_256_px(gpu: Gpu, dtype: torch.dtype) -> None:
    assert_right(gpu, ScaleSchedule(SCALES_256), 64, 1, dtype, 1.0)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", ["unaligned", "heads first", "expanded", "strided"])
def test_memory(gpu: Gpu, layout: str, dtype: torch.dtype) -> None:
    """The same numbers elsewhere in memory give the same bits."""
    schedule = oracle.ODD[151]
    given = [t.contiguous() for t in packed(2, 151, 3, 32, dtype)]
    grad = torch.randn(2, 151, 3, 32).to(dtype)
    if layout == "expanded":
        given, grad = [t[:1, :, :1].expand(2, -1, 3, -1) for t in given], grad[..., :1].expand(grad.shape)
    place = {
        "unaligned": oracle.unaligned,
        "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": lambda t: t,
        "strided": lambda t: torch.stack([t, -t], dim=-1)[..., 0],
    }[layout]
    expected = on(gpu, [t.contiguous() for t in given], grad.contiguous(), schedule)
    results = on(gpu, [place(t) for t in given], place(grad), schedule)
    assert all(torch.equal(result, want) for result, want in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_not_lost(gpu: Gpu, which: int, dtype: torch.dtype) -> None:
    """In what depends on it, and in nothing of a coarser tile or another head."""
    given = [t.contiguous() for t in packed(1, 146, 2, 32, dtype)]
    given[which][0, 100, 1, 3] = torch.nan
    _, dq, dk, dv = on(gpu, given, torch.ones_like(given[0]), ScaleSchedule((1, 8, 9)))
    hit = torch.zeros(146, dtype=torch.bool)
    hit[100 if which == 0 else slice(65, 146)] = True
    assert not torch.stack([dq, dk, dv])[:, 0, :, 0].isnan().any()
    assert torch.equal(dq[0, :, 1].isnan().any(-1), hit)
    assert dk[0, :, 1].isnan().any(-1).all()  # each key is seen by that query


@pytest.mark.parametrize("dtype", HALF)
def test_delta_is_kept_for_the_second_kernel(gpu: Gpu, dtype: torch.dtype) -> None:
    """(B, H, L): the sum of grad * out over a head, and nothing beside it is written."""
    schedule, shape = oracle.ODD[151], (2, 151, 3, 32)
    q, k, v = (t.contiguous() for t in packed(2, 151, 3, 32, dtype))
    grad, out, lse = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.full((2, 3, 151), 5.0)
    room = torch.full((2 * 3 * 151 + 64,), 7.0)
    delta = room[:-64].view(2, 3, 151)
    placed = [gpu(t) for t in (grad, q, k, v, out, lse, *torch.empty(3, *shape).to(dtype).unbind(0), room)]
    moved = placed.pop()[:-64].view(2, 3, 151)
    kernels(moved).block_causal_attention_backward(*map(view, placed), view(moved), schedule.patch_nums, 1.0)
    delta.copy_(moved)
    wanted = torch.einsum("blhd,blhd->bhl", grad.double(), out.double())
    oracle.assert_equal_up_to_rounding(delta, wanted)
    assert (room[-64:] == 7).all()


@pytest.mark.parametrize("dtype", HALF)
def test_offsets_beyond_32_bits(gpu: Gpu, dtype: torch.dtype) -> None:
    if gpu.level != "emulated":
        pytest.skip("moves 16 GB, of which the emulator touches a few pages")
    given = [t.contiguous() for t in packed(2, 5, 2, 32, dtype)]
    grad = torch.randn(2, 5, 2, 32).to(dtype)
    near = on(gpu, given, grad, ScaleSchedule((1, 2)))
    results = on(gpu, [far_apart(t) for t in given], far_apart(grad), ScaleSchedule((1, 2)))
    assert all(torch.equal(result, want) for result, want in zip(results, near, strict=True))


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", HALF)
def test_the_order_of_threads_changes_no_bit(gpu: Gpu, dim: int, dtype: torch.dtype) -> None:
    given, runs = packed(1, 151, 2, dim, dtype), []
    for seed in range(3):
        if gpu.level == "emulated":
            emulation.emulator().seed(seed)
        runs.append(on(gpu, given, torch.ones_like(given[0]), oracle.ODD[151]))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", HALF)
def test_no_bank_conflicts(traced: Gpu, dim: int, dtype: torch.dtype) -> None:
    given = packed(1, 151, 1, dim, dtype)
    on(traced, given, torch.ones_like(given[0]), oracle.ODD[151])
    assert traced.conflicts() == []


def test_refusals(gpu: Gpu) -> None:
    def refused(message: str, dim: int = 32, delta: Tensor | None = None, off: int = -1) -> None:
        whole = gpu(torch.zeros(1, 5, 2, dim + 1))
        given = [view(whole[..., 1:] if i == off else whole[..., :dim].contiguous()) for i in range(8)]
        lse = view(gpu(torch.zeros(1, 2, 5)))
        with pytest.raises(ValueError, match=f"^block_causal_attention_backward: {message}"):
            kernels(whole).block_causal_attention_backward(
                *given[:5], lse, *given[5:], maybe_view(delta), [1, 2], 1.0
            )

    refused(r"delta must have shape \(B, H, L\) on CUDA, got none")
    refused(r"delta must have shape \(1, 2, 5\), got \(1, 5, 2\)", delta=gpu(torch.zeros(1, 5, 2)))
    delta = gpu(torch.zeros(1, 2, 5))
    refused("q must have a D of 32, 64 or 128 on CUDA, got 40", dim=40, delta=delta)
    for i, name in enumerate(("grad_out", "q", "k", "v", "out", "dq", "dk", "dv")):
        refused(f"{name} must have rows that begin at multiples of 16 bytes", delta=delta, off=i)
