from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops import oracle
from var_ext import ScaleSchedule, ops


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


def test_registration() -> None:
    q, k, v = (t.clone().requires_grad_() for t in packed(2, 5, 2, 8))
    torch.library.opcheck(torch.ops.var_ext.block_causal_attention, (q, k, v, [1, 2], 1.0))


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
