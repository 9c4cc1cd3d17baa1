from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import oracle
from var_ext import ops

SHAPES = [
    (1, 1, 1, 4),
    (2, 7, 3, 64),
    (1, 129, 1, 64),
    (2, 151, 3, 32),
    (0, 7, 2, 8),
    (2, 0, 2, 8),
]  # B, L, H, D


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    batch, length, heads, dim = shape
    qkv = torch.randn(batch, length, 3, heads, dim).to(dtype)
    q_bias, v_bias = torch.randn(2, heads, dim).to(dtype)
    return (
        qkv,
        q_bias,
        v_bias,
        (torch.rand(heads) * 6).to(dtype),
    )  # some above log 100, where the scale is capped


def formula(qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor | None) -> list[Tensor]:
    """q, k, v in the dtype of the arguments."""
    q, k, v = qkv[:, :, 0] + q_bias, qkv[:, :, 1], qkv[:, :, 2] + v_bias
    if log_scale is not None:
        q, k = (t / t.square().sum(dim=-1, keepdim=True).sqrt().clamp_min(1e-12) for t in (q, k))
        q = q * torch.minimum(log_scale, torch.tensor(math.log(100)).to(log_scale)).exp()[:, None]
    return [q, k, v]


def exact(*given: Tensor | None) -> list[Tensor]:
    return formula(*(None if t is None else t.double() for t in given))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("norm", [True, False])
def test_against_float64(either_backend: str, shape: tuple[int, ...], dtype: torch.dtype, norm: bool) -> None:
    given: tuple[Any, ...] = inputs(shape, dtype)
    given = given if norm else (*given[:3], None)
    results = ops.qk_norm(*given)
    for mine, torchs, truth in zip(results, formula(*given), exact(*given), strict=True):
        assert mine.shape == shape
        oracle.assert_as_good_as_torch(mine, torchs, truth)


def test_the_scale_is_capped_at_100(either_backend: str) -> None:
    qkv, q_bias, v_bias, _ = inputs((1, 3, 2, 8))
    q = ops.qk_norm(qkv, q_bias, v_bias, torch.tensor([math.log(100), 50.0]))[0]
    torch.testing.assert_close(q.norm(dim=-1), torch.full((1, 3, 2), 100.0))


def test_a_zero_vector_stays_finite(either_backend: str) -> None:
    heads = torch.zeros(2, 8)
    for result in ops.qk_norm(torch.zeros(1, 3, 3, 2, 8), heads, heads, torch.zeros(2)):
        assert torch.equal(result, torch.zeros(1, 3, 2, 8))


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("length", "offset", "room"), [(1, 0, 1), (4, 1, 5), (7, 0, 9), (3, 6, 9), (0, 4, 4)]
)
def test_into_the_cache(
    either_backend: str, dtype: torch.dtype, norm: bool, length: int, offset: int, room: int
) -> None:
    given: tuple[Any, ...] = inputs((2, length, 3, 16), dtype)
    given = given if norm else (*given[:3], None)
    q, k, v = ops.qk_norm(*given)
    cache = torch.full((2, 2, room, 3, 16), 7.0, dtype=dtype).unbind(0)
    result = ops.qk_norm(*given, cache=cache, offset=offset)
    assert torch.equal(result, q)
    for filled, wanted in zip(cache, (k, v), strict=True):
        assert torch.equal(filled[:, offset : offset + length], wanted)
        assert (filled[:, :offset] == 7).all()
        assert (filled[:, offset + length :] == 7).all()


def test_into_a_strided_cache(either_backend: str) -> None:
    given = inputs((2, 3, 2, 8))
    k_cache, v_cache = torch.zeros(2, 2, 2, 9, 8).transpose(2, 3).unbind(0)  # heads first in memory
    ops.qk_norm(*given, cache=(k_cache, v_cache), offset=4)
    _, k, v = exact(*given)
    oracle.assert_equal_up_to_rounding(k_cache[:, 4:7], k)
    oracle.assert_equal_up_to_rounding(v_cache[:, 4:7], v)


def test_strided_qkv(either_backend: str) -> None:
    qkv = torch.randn(3, 2, 5, 4, 16)[..., ::2].permute(1, 2, 0, 3, 4)[:, :, :, 1:3]  # (2, 5, 3, 2, 8)
    q_bias, v_bias = torch.randn(8, 2, 2).permute(1, 2, 0)
    given = (qkv, q_bias, v_bias, torch.rand(4)[::2])
    for mine, truth in zip(ops.qk_norm(*given), exact(*given), strict=True):
        oracle.assert_equal_up_to_rounding(mine, truth)


@pytest.mark.parametrize("norm", [True, False])
def test_gradients(either_backend: str, norm: bool) -> None:
    # well below the cap, at which the scale has a kink
    given = [t.clone().requires_grad_() for t in inputs((2, 3, 2, 4), torch.float64)]
    given[3].data.mul_(0.5)
    given = given if norm else given[:3]
    assert torch.autograd.gradcheck(ops.qk_norm, given)


def test_the_cache_form_has_no_gradient(either_backend: str) -> None:
    given = [t.requires_grad_() for t in inputs((1, 2, 1, 4))]
    cache = torch.zeros(2, 1, 2, 1, 4).unbind(0)
    assert not ops.qk_norm(*given, cache=cache, offset=0).requires_grad
    assert not cache[0].requires_grad


def test_registration() -> None:
    given = [t.clone().requires_grad_() for t in inputs((2, 3, 2, 4))]
    torch.library.opcheck(torch.ops.var_ext.qk_norm, tuple(given))
    torch.library.opcheck(torch.ops.var_ext.qk_norm, (*given[:3], None))
    for log_scale in (given[3].detach(), None):
        plain = [t.detach() for t in given[:3]]
        caches = [torch.zeros(2, 5, 2, 4) for _ in range(2)]
        torch.library.opcheck(torch.ops.var_ext.qk_norm_into_cache, (*plain, log_scale, *caches, 2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(qkv=torch.zeros(1, 3, 2, 2, 4)), ValueError, r"qkv must have shape.*got \(1, 3, 2, 2, 4\)"),
        (
            dict(qkv=torch.zeros(1, 3, 24)),
            ValueError,
            r"qkv must have shape \(B, L, 3, H, D\).*got \(1, 3, 24\)",
        ),
        (dict(q_bias=torch.zeros(8)), ValueError, r"q_bias must have shape \(H, D\) = \(2, 4\), got \(8,\)"),
        (dict(v_bias=torch.zeros(4, 2)), ValueError, r"v_bias must have shape.*got \(4, 2\)"),
        (dict(log_scale=torch.zeros(3)), ValueError, r"log_scale must have shape \(H,\) = \(2\), got \(3,\)"),
        (
            dict(cache=(torch.zeros(1, 9, 2, 4), torch.zeros(1, 8, 2, 4))),
            ValueError,
            "v_cache must have shape",
        ),
        (
            dict(cache=(torch.zeros(2, 9, 2, 4), torch.zeros(2, 9, 2, 4))),
            ValueError,
            "k_cache must have shape",
        ),
        (dict(offset=7), ValueError, "offset must leave room for 3 tokens in 9, got 7"),
        (dict(offset=-1), ValueError, "offset must leave room for 3 tokens in 9, got -1"),
        (dict(qkv=torch.zeros(1, 3, 3, 2, 4).int()), TypeError, "qkv must be float32.*got int32"),
        (dict(v_bias=torch.zeros(2, 4).half()), TypeError, "one dtype, got.*v_bias float16"),
        (dict(cache=tuple(torch.zeros(2, 1, 9, 2, 4).half())), TypeError, "one dtype, got.*k_cache float16"),
        (dict(q_bias=torch.zeros(2, 4, device="meta")), ValueError, "one device, got.*q_bias on meta"),
        (
            dict(cache=tuple(torch.zeros(2, 1, 9, 2, 4, device="meta"))),
            ValueError,
            "one device, got.*k_cache on meta",
        ),
    ],
)
def test_bad_input(
    either_backend: str, change: dict[str, object], error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = dict(
        qkv=torch.zeros(1, 3, 3, 2, 4),
        q_bias=torch.zeros(2, 4),
        v_bias=torch.zeros(2, 4),
        log_scale=torch.zeros(2),
        cache=tuple(torch.zeros(2, 1, 9, 2, 4)),
        offset=0,
    )
    with pytest.raises(error, match=f"qk_norm: .*{message}"):
        ops.qk_norm(**{**given, **change})
