from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import Gpu
from tests.cuda.test_block_causal_attention import HALF, SCHEDULES
from tests.emulator import emulation
from tests.ops import oracle
from tests.ops.test_block_causal_attention import packed, with_gradients
from var_ext import ScaleSchedule
from var_ext.ops._native import kernels, maybe_view, view
from var_ext.schedule import SCALES_256

NAN = float("nan")


def saved(given: Sequence[Tensor], schedule: ScaleSchedule, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse as forward saves them, from float64."""
    q, k, v = (t.double() for t in given)
    out, lse = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1])
    for tokens in schedule.slices:  # keys that are not seen may be NaN
        seen = slice(tokens.stop)
        scores = torch.einsum("blhd,bmhd->bhlm", q[:, tokens], k[:, seen]) * scale
        out[:, tokens] = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v[:, seen])
        lse[:, :, tokens] = scores.logsumexp(-1).float()
    return out.to(given[0].dtype), lse


def backward(
    gpu: Gpu, grad: Tensor, given: Sequence[Tensor], schedule: ScaleSchedule, scale: float = 1.0
) -> list[Tensor]:
    """The kernels on the tensors as they lie, with scratch and outputs that begin as NaN."""
    out, lse = saved(given, schedule, scale)
    placed = [gpu(t) for t in (grad, *given, out, lse)]
    results = [gpu(torch.full(t.shape, NAN, dtype=t.dtype)) for t in given]
    delta = gpu(torch.full(lse.shape, NAN))
    kernels(placed[0]).block_causal_attention_backward(
        *map(view, placed), *map(view, results), view(delta), schedule.patch_nums, scale
    )
    return [t.cpu() for t in results]


def assert_right(given: Sequence[Tensor], schedule: ScaleSchedule, scale: float, gpu: Gpu) -> None:
    """As near to float64 as torch is in the same dtype."""
    grad = torch.randn(given[0].shape).to(given[0].dtype)
    formula = partial(oracle.attention, scale=scale, mask=oracle.sees(schedule))
    torchs = with_gradients(formula, list(given), grad)[1:]
    exact = with_gradients(formula, [t.double() for t in given], grad.double())[1:]
    for result, torchs_own, right in zip(
        backward(gpu, grad, given, schedule, scale), torchs, exact, strict=True
    ):
        oracle.assert_as_good_as_torch(result, torchs_own, right)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: str(schedule.num_tokens))
@pytest.mark.parametrize("dtype", HALF)
def test_against_float64(gpu: Gpu, schedule: ScaleSchedule, dtype: torch.dtype) -> None:
    heads = 3 if schedule.num_tokens < 160 else 1
    assert_right(packed(2, schedule.num_tokens, heads, 64, dtype), schedule, 0.7, gpu)


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_each_head_size(gpu: Gpu, dim: int, dtype: torch.dtype, scale: float) -> None:
    assert_right(packed(1, 151, 1, dim, dtype), oracle.ODD[151], scale, gpu)


def test_all_scales_of_256_px(gpu: Gpu) -> None:
    assert_right(packed(1, 680, 1, 64, torch.bfloat16), ScaleSchedule(SCALES_256), 1.0, gpu)


@pytest.mark.parametrize("dim", [32, 128])
def test_small_scales_that_share_tiles(gpu: Gpu, dim: int) -> None:
    assert_right(packed(1, 100, 1, dim, torch.bfloat16), ScaleSchedule((5, 5, 5, 5)), 1.0, gpu)


def test_large_log_sum_exp_of_either_sign(gpu: Gpu) -> None:
    """Weights of keys and queries that only pad a tile would overflow."""
    schedule = ScaleSchedule((1, 8, 9))
    for sign in (1, -1):
        q, k, v = packed(1, 146, 1, 32, torch.bfloat16)
        q[..., 0], k[..., 0] = 16.0, 16.0 * sign
        assert_right([q, k, v], schedule, 1.0, gpu)


@pytest.mark.parametrize("layout", ["heads first", "expanded", "wide rows"])
def test_memory(gpu: Gpu, layout: str) -> None:
    """The same numbers elsewhere in memory give the same bits."""
    schedule, dtype = oracle.ODD[151], torch.bfloat16
    given = [t.contiguous() for t in packed(2, 151, 3, 32, dtype)]
    grad = torch.randn(given[0].shape).to(dtype)
    if layout == "expanded":
        given = [t[:1, :, :1].expand(2, -1, 3, -1) for t in given]
        grad = grad[:, :1].expand(-1, 151, -1, -1)
    placed = {
        "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": lambda t: t,
        "wide rows": lambda t: torch.cat([t, t], dim=-1)[..., :32],
    }[layout]
    expected = backward(gpu, grad.contiguous(), [t.contiguous() for t in given], schedule)
    results = backward(gpu, placed(grad), [placed(t) for t in given], schedule)
    assert all(torch.equal(result, right) for result, right in zip(results, expected, strict=True))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_not_lost(gpu: Gpu, which: int) -> None:
    """NaN in one token of q, k or v: in what depends on it, and in nothing of a coarser tile or another head."""
    schedule = ScaleSchedule((1, 8, 9))
    given = [t.contiguous() for t in packed(1, 146, 2, 32, torch.bfloat16)]
    given[which][0, 100, 1, 3] = NAN
    dq, dk, dv = backward(gpu, torch.ones_like(given[0]), given, schedule)
    hit = torch.zeros(146, dtype=torch.bool)
    hit[100 if which == 0 else slice(65, 146)] = True
    assert not torch.stack([dq, dk, dv])[:, 0, :, 0].isnan().any()
    assert torch.equal(dq[0, :, 1].isnan().any(-1), hit)
    assert dk[0, :, 1].isnan().any(-1).all()  # each key is seen by that query


def test_the_order_of_threads_changes_no_bit(gpu: Gpu) -> None:
    given = packed(1, 151, 2, 64, torch.bfloat16)
    grad = torch.randn(given[0].shape).bfloat16()
    runs = []
    for seed in range(3):
        if gpu.level == "emulated":
            emulation.emulator().seed(seed)
        runs.append(backward(gpu, grad, given, oracle.ODD[151]))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_offsets_beyond_32_bits(gpu: Gpu) -> None:
    if gpu.level != "emulated":
        pytest.skip("moves 4 GB and more, of which the emulator touches a few pages")
    far, schedule = 2**31, ScaleSchedule((1, 2))

    def spread(x: Tensor) -> Tensor:
        place = torch.empty(far + x[0].numel(), dtype=x.dtype)
        return place.as_strided(x.shape, (far, *x.stride()[1:])).copy_(x)

    given = [t.contiguous() for t in packed(2, 5, 2, 32, torch.bfloat16)]
    grad = torch.randn(given[0].shape).bfloat16()
    out, lse = saved(given, schedule, 1.0)
    results = [spread(torch.zeros_like(out)) for _ in range(3)]
    apart, delta = [spread(t) for t in (grad, *given, out)], torch.empty_like(lse)  # views keep nothing alive
    kernels(grad).block_causal_attention_backward(
        *map(view, apart), view(lse), *map(view, results), view(delta), schedule.patch_nums, 1.0
    )
    for result, expected in zip(results, backward(gpu, grad, given, schedule), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_no_bank_conflicts(traced: Gpu, dim: int) -> None:
    given = packed(1, 151, 1, dim, torch.bfloat16)
    backward(traced, torch.randn(given[0].shape).bfloat16(), given, oracle.ODD[151])
    assert traced.conflicts() == []


def test_the_kernel_refuses(gpu: Gpu) -> None:
    def refused(message: str, dim: int = 32, odd: int = -1, delta: bool = True) -> None:
        whole = gpu(torch.zeros(1, 5, 2, dim, dtype=torch.bfloat16))
        off = gpu(torch.zeros(1, 5, 2, dim + 1, dtype=torch.bfloat16))[..., 1:]
        lse = gpu(torch.zeros(1, 2, 5))
        tensors = [off if i == odd else whole for i in range(8)]  # grad_out, q, k, v, out, dq, dk, dv
        with pytest.raises(ValueError, match=f"^block_causal_attention_backward: {message}"):
            kernels(whole).block_causal_attention_backward(
                *map(view, tensors[:5]), view(lse), *map(view, tensors[5:]),
                maybe_view(lse if delta else None), [1, 2], 1.0,
            )  # fmt: skip

    refused("D must be 32, 64 or 128 on CUDA, got 20", dim=20)
    refused(r"delta must have shape \(B, H, L\) on CUDA, got none", delta=False)
    for i, name in enumerate(("grad_out", "q", "k", "v", "out", "dq", "dk", "dv")):
        refused(f"{name} must have rows that begin at multiples of 16 bytes", odd=i)
