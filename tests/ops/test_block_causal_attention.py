from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import oracle
from tests.threads import threads
from var_ext import _C, ScaleSchedule, backend, ops
from var_ext.ops._native import view
from var_ext.schedule import SCALES_256

# Tiles within a scale and across scales, keys of less and of more than a block, at their borders
SCHEDULES = [*oracle.ODD.values(), ScaleSchedule((8,)), ScaleSchedule((5, 5, 5, 5)), ScaleSchedule((1, 8, 9))]


def packed(batch: int, length: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v as they come out of one projection: (B, L, H, D) views of (B, L, 3, H, D)."""
    return list(torch.randn(batch, length, 3, heads, dim).mul(dim**-0.25).to(dtype).unbind(2))


@pytest.mark.parametrize("length", oracle.ODD)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_against_float64(either_backend: str, length: int, heads: int, dtype: torch.dtype) -> None:
    schedule = oracle.ODD[length]
    q, k, v = packed(2, length, heads, 64, dtype)
    mask = oracle.sees(schedule)
    result = ops.block_causal_attention(q, k, v, schedule, scale=0.7)
    assert result.is_contiguous()
    torchs = oracle.attention(q, k, v, 0.7, mask)
    oracle.assert_as_good_as_torch(
        result, torchs, oracle.attention(q.double(), k.double(), v.double(), 0.7, mask)
    )


def test_finer_scales_are_not_seen(either_backend: str) -> None:
    schedule = ScaleSchedule((1, 2, 3))
    q, k, v = packed(1, 14, 2, 16)
    before = ops.block_causal_attention(q, k, v, schedule)
    k[:, 5:], v[:, 5:] = 100.0, torch.nan
    after = ops.block_causal_attention(q[:, :5], k[:, :5], v[:, :5], ScaleSchedule((1, 2)))
    torch.testing.assert_close(after, before[:, :5])


def test_one_token_sees_itself(either_backend: str) -> None:
    q, k, v = packed(3, 1, 2, 8)
    torch.testing.assert_close(ops.block_causal_attention(q, k, v, ScaleSchedule((1,))), v)


def test_large_scores_do_not_overflow(either_backend: str) -> None:
    q, k, v = packed(1, 5, 1, 8)
    schedule = ScaleSchedule((1, 2))
    result = ops.block_causal_attention(q * 100, k * 100, v, schedule)
    exact = oracle.attention(q.double() * 100, k.double() * 100, v.double(), 1.0, oracle.sees(schedule))
    # scores near 1e4 carry a rounding error of 1e-3, which the exponential passes on
    torch.testing.assert_close(result.double(), exact, rtol=1e-2, atol=1e-2)


def test_strided_views(either_backend: str) -> None:
    schedule = oracle.ODD[7]
    q, k, v = torch.randn(3, 2, 3, 7, 32)[..., ::2].transpose(2, 3).unbind(0)  # (B, L, H, D) with D strided
    result = ops.block_causal_attention(q, k, v, schedule)
    exact = oracle.attention(q.double(), k.double(), v.double(), 1.0, oracle.sees(schedule))
    oracle.assert_equal_up_to_rounding(result, exact)


def test_batch_of_none(either_backend: str) -> None:
    q, k, v = packed(0, 5, 2, 8)
    assert ops.block_causal_attention(q, k, v, ScaleSchedule((1, 2))).shape == (0, 5, 2, 8)


def test_gradients(either_backend: str) -> None:
    schedule = ScaleSchedule((1, 2))
    given = [t.clone().requires_grad_() for t in packed(2, 5, 2, 3, torch.float64)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: ops.block_causal_attention(q, k, v, schedule, scale=0.5), given
    )


def with_gradients(function: Callable[..., Tensor], given: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The result and the gradients of all that is given."""
    leaves = [t.detach().requires_grad_() for t in given]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_gradients(given: list[Tensor], schedule: ScaleSchedule, scale: float) -> None:
    """Result and gradients of the op: as good as those of the reference in the same dtype."""
    grad = torch.randn(given[0].shape).to(given[0].dtype)
    results = {}
    for choice in backend.CHOICES:
        with backend.force(choice):
            op = partial(ops.block_causal_attention, schedule=schedule, scale=scale)
            results[choice] = with_gradients(op, given, grad)
    exactly = partial(oracle.attention, scale=scale, mask=oracle.sees(schedule))
    exact = with_gradients(exactly, [t.double() for t in given], grad.double())
    for result, torchs, right in zip(results["native"], results["reference"], exact, strict=True):
        if given[0].dtype == torch.float32:
            oracle.assert_equal_up_to_rounding(result, right)
        else:
            oracle.assert_as_good_as_torch(result, torchs, right)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: str(schedule.num_tokens))
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_each_variant(each_isa: str, schedule: ScaleSchedule, dtype: torch.dtype) -> None:
    assert_gradients(packed(2, schedule.num_tokens, 3, 64, dtype), schedule, 0.7)


@pytest.mark.parametrize("dim", [1, 7, 32, 50, 128])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_each_head_size(each_isa: str, dim: int, dtype: torch.dtype) -> None:
    assert_gradients(packed(1, 151, 1, dim, dtype), oracle.ODD[151], -0.7)


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_all_scales_of_256_px(each_isa: str, dtype: torch.dtype) -> None:
    assert_gradients(packed(1, 680, 1, 64, dtype), ScaleSchedule(SCALES_256), 1.0)


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("layout", ["unaligned", "heads first", "expanded"])
def test_memory(each_isa: str, layout: str, dtype: torch.dtype) -> None:
    """The same numbers elsewhere in memory give the same bits."""
    schedule = oracle.ODD[151]
    given = [t.contiguous() for t in packed(2, 151, 3, 20, dtype)]
    if layout == "expanded":
        given = [t[:1, :, :1].expand(2, -1, 3, -1) for t in given]
    placed = {
        "unaligned": lambda t: torch.empty(t.numel() + 1, dtype=dtype)[1:].view(t.shape).copy_(t),
        "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": lambda t: t,
    }[layout]
    op = partial(ops.block_causal_attention, schedule=schedule)
    grad = torch.randn(given[0].shape).to(dtype)
    expected = with_gradients(op, [t.contiguous() for t in given], grad)
    results = with_gradients(op, [placed(t) for t in given], placed(grad))
    assert all(torch.equal(result, right) for result, right in zip(results, expected, strict=True))


def test_gradient_of_a_sum(each_isa: str) -> None:
    """It is one number, expanded: no axis of it is dense."""
    given, schedule = packed(1, 7, 2, 16), oracle.ODD[7]
    op = partial(ops.block_causal_attention, schedule=schedule)
    results = with_gradients(op, given, torch.ones(1).expand(1, 7, 2, 16))
    for result, expected in zip(results, with_gradients(op, given, torch.ones(1, 7, 2, 16)), strict=True):
        assert torch.equal(result, expected)


def test_log_sum_exp(each_isa: str) -> None:
    q, k, v = packed(2, 151, 3, 32)
    sides = list(oracle.ODD[151].patch_nums)
    _, lse = torch.ops.var_ext.block_causal_attention(q, k, v, sides, 0.5)
    scores = torch.einsum("blhd,bmhd->bhlm", q.double(), k.double()) * 0.5
    exact = scores.masked_fill(~oracle.sees(oracle.ODD[151]), -torch.inf).logsumexp(-1)
    oracle.assert_equal_up_to_rounding(lse, exact)


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("heads", [1, 3])
def test_thread_count_changes_nothing(dtype: torch.dtype, heads: int) -> None:
    given = packed(1, 680, heads, 16, dtype)
    grad = torch.randn(given[0].shape).to(dtype)
    op = partial(ops.block_causal_attention, schedule=ScaleSchedule(SCALES_256))
    runs = []
    for count in (1, 2, 3):
        with threads(count), backend.force("native"):
            runs.append(with_gradients(op, given, grad))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_not_lost(each_isa: str, which: int, dtype: torch.dtype) -> None:
    """NaN in one token of q, k or v: in what depends on it, and in nothing of a coarser scale or another head."""
    schedule = ScaleSchedule((1, 8, 9))  # two scales of more than a tile
    given = [t.contiguous() for t in packed(1, 146, 2, 20, dtype)]
    given[which][0, 100, 1, 3] = torch.nan
    grad = torch.ones_like(given[0])
    out, dq, dk, dv = with_gradients(partial(ops.block_causal_attention, schedule=schedule), given, grad)
    hit = torch.zeros(146, dtype=torch.bool)
    hit[100 if which == 0 else slice(65, 146)] = True
    assert torch.equal(out[0, :, 1].isnan().any(-1), hit)
    assert not torch.stack([out, dq, dk, dv])[:, 0, :, 0].isnan().any()
    assert torch.equal(dq[0, :, 1].isnan().any(-1), hit)
    assert dk[0, :, 1].isnan().any(-1).all()  # each key is seen by that query


def test_no_weights_at_scale_zero(either_backend: str) -> None:
    q, k, v = packed(1, 5, 1, 8)
    result = ops.block_causal_attention(q, k, v, ScaleSchedule((1, 2)), scale=0.0)
    torch.testing.assert_close(result[:, 1:], v.mean(dim=1, keepdim=True).expand(1, 4, 1, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_registration(dtype: torch.dtype) -> None:
    q, k, v = (t.clone().requires_grad_() for t in packed(2, 5, 2, 8, dtype))
    torch.library.opcheck(torch.ops.var_ext.block_causal_attention, (q, k, v, [1, 2], 1.0))
    with torch.no_grad():
        out, lse = torch.ops.var_ext.block_causal_attention(q, k, v, [1, 2], 1.0)
        given = (torch.randn_like(out), q.detach(), k.detach(), v.detach(), out, lse, [1, 2], 1.0)
        torch.library.opcheck(torch.ops.var_ext.block_causal_attention_backward, given)


def test_the_kernels_run_when_the_backend_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("block_causal_attention", "block_causal_attention_backward"):
        kernel = getattr(_C, name)
        monkeypatch.setattr(
            _C, name, lambda *given, name=name, kernel=kernel: (calls.append(name), kernel(*given))
        )
    for choice in backend.CHOICES:
        with backend.force(choice):
            q, k, v = (t.clone().requires_grad_() for t in packed(1, 5, 1, 8))
            ops.block_causal_attention(q, k, v, ScaleSchedule((1, 2))).sum().backward()
        assert calls == ["block_causal_attention", "block_causal_attention_backward"], choice


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=zeros(5, 2, 8)), r"q must have shape \(B, L, H, D\), got \(5, 2, 8\)"),
        (dict(k=zeros(1, 4, 2, 8)), r"k must have shape \(1, 5, 2, 8\), got \(1, 4, 2, 8\)"),
        (dict(v=zeros(1, 5, 2, 8).half()), "v must be float32, got float16"),
        (dict.fromkeys(("q", "k", "v", "out"), zeros(1, 5, 2, 0)), "q must have D of at least 1"),
        (dict(q=zeros(1, 5, 2, 8).double()), "q must be one of float32, bfloat16, float16, got float64"),
        (dict(v=zeros(1, 5, 2, 16)[..., ::2]), "v must have stride 1 along D, got 2"),
        (dict(out=zeros(1, 5, 2, 9)), r"out must have shape \(1, 5, 2, 8\), got \(1, 5, 2, 9\)"),
        (dict(lse=zeros(1, 5, 2)), r"lse must have shape \(1, 2, 5\), got \(1, 5, 2\)"),
        (dict(lse=zeros(1, 5, 2).mT), "lse must be contiguous"),
        (dict(patch_nums=[1, 3]), "q must have the L = 10 of patch_nums, got 5"),
        (dict(patch_nums=[0, 2, 1]), "patch_nums must be 1 to 46340 each, got 0"),
    ],
)
def test_the_kernels_refuse(change: dict[str, Any], message: str) -> None:
    given = {name: zeros(1, 5, 2, 8) for name in ("q", "k", "v", "out")}
    given |= dict(lse=zeros(1, 2, 5), patch_nums=[1, 2], scale=1.0)
    given = {k: view(v) if isinstance(v, Tensor) else v for k, v in {**given, **change}.items()}
    with pytest.raises(ValueError, match=f"^block_causal_attention: {message}"):
        _C.block_causal_attention(**given)
    like = {name: given["q"] for name in ("grad_out", "dq", "dk", "dv")}
    with pytest.raises(ValueError, match=f"^block_causal_attention_backward: {message}"):
        _C.block_causal_attention_backward(**like, delta=None, **given)


def test_the_kernels_refuse_outputs_that_overlap() -> None:
    one, lse = view(zeros(1, 5, 2, 8)), view(zeros(1, 2, 5))
    same = view(zeros(1, 5, 1, 8).expand(1, 5, 2, 8))
    with pytest.raises(ValueError, match="out must not overlap itself"):
        _C.block_causal_attention(one, one, one, same, lse, [1, 2], 1.0)
    with pytest.raises(ValueError, match="dk must not overlap itself"):
        _C.block_causal_attention_backward(one, one, one, one, one, lse, one, same, one, None, [1, 2], 1.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=torch.zeros(5, 2, 8)), ValueError, r"q must have shape \(B, L, H, D\).*got \(5, 2, 8\)"),
        (
            dict(k=torch.zeros(1, 4, 2, 8)),
            ValueError,
            r"k must have shape.*\(1, 5, 2, 8\), got \(1, 4, 2, 8\)",
        ),
        (dict(v=torch.zeros(1, 5, 2, 9)), ValueError, r"v must have shape.*got \(1, 5, 2, 9\)"),
        (dict(schedule=ScaleSchedule((1, 2, 3))), ValueError, "L = 14 of the schedule, got 5"),
        (dict(k=torch.zeros(1, 5, 2, 8).half()), TypeError, "one dtype, got.*k float16"),
        (dict.fromkeys("qkv", torch.zeros(1, 5, 2, 8).int()), TypeError, "q must be float32.*got int32"),
        (dict(v=torch.zeros(1, 5, 2, 8, device="meta")), ValueError, "one device, got.*v on meta"),
        (dict(q=None), TypeError, "q must be a tensor.*got NoneType"),
    ],
)
def test_bad_input(
    either_backend: str, change: dict[str, object], error: type[Exception], message: str
) -> None:
    given = dict(zip("qkv", torch.zeros(3, 1, 5, 2, 8), strict=True), schedule=ScaleSchedule((1, 2)))
    with pytest.raises(error, match=f"block_causal_attention: .*{message}"):
        ops.block_causal_attention(**{**given, **change})  # type: ignore[arg-type]
