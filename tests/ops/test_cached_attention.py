from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops import oracle
from tests.threads import threads
from var_ext import _C, ScaleSchedule, backend, ops
from var_ext.ops._native import view


def inputs(
    batch: int, queries: int, room: int, heads: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, queries, heads, dim).mul(dim**-0.25).to(dtype)
    keys, values = torch.randn(2, batch, room, heads, dim).mul(dim**-0.25).to(dtype)
    return q, keys, values


@pytest.mark.parametrize(
    ("queries", "length", "room"), [(1, 1, 1), (4, 5, 7), (22, 129, 151), (121, 151, 151), (3, 1, 9)]
)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_against_float64(
    either_backend: str, queries: int, length: int, room: int, heads: int, dtype: torch.dtype
) -> None:
    q, keys, values = inputs(2, queries, room, heads, 64, dtype)
    result = ops.cached_attention(q, keys, values, length, scale=0.7)
    assert result.is_contiguous()
    seen = keys[:, :length], values[:, :length]
    exact = oracle.attention(q.double(), seen[0].double(), seen[1].double(), 0.7)
    oracle.assert_as_good_as_torch(result, oracle.attention(q, *seen, 0.7), exact)


def test_the_rest_of_the_cache_is_never_read(either_backend: str) -> None:
    q, keys, values = inputs(1, 4, 9, 2, 16)
    before = ops.cached_attention(q, keys, values, 5)
    keys[:, 5:], values[:, 5:] = torch.nan, torch.nan
    assert torch.equal(ops.cached_attention(q, keys, values, 5), before)


def test_scale_by_scale_it_is_block_causal_attention(either_backend: str) -> None:
    schedule = ScaleSchedule((1, 2, 3, 4))
    q, k, v = inputs(2, 30, 30, 2, 16)
    whole = ops.block_causal_attention(q, k, v, schedule)
    for s in schedule.slices:
        # the same sums in another order: fp32 rounding
        torch.testing.assert_close(
            ops.cached_attention(q[:, s], k, v, s.stop), whole[:, s], rtol=1e-5, atol=1e-5
        )


def test_strided_views(either_backend: str) -> None:
    q = torch.randn(2, 4, 3, 2, 16)[:, :, 0]  # of a packed qkv
    cache = torch.randn(2, 2, 3, 9, 32)[..., ::2].transpose(2, 3)  # heads first in memory, D strided
    result = ops.cached_attention(q, cache[0, :, :, :2], cache[1, :, :, 1:], 7)
    exact = oracle.attention(q.double(), cache[0, :, :7, :2].double(), cache[1, :, :7, 1:].double(), 1.0)
    oracle.assert_equal_up_to_rounding(result, exact)


@pytest.mark.parametrize(("batch", "queries"), [(0, 4), (2, 0)])
def test_nothing_in_nothing_out(either_backend: str, batch: int, queries: int) -> None:
    assert ops.cached_attention(*inputs(batch, queries, 5, 2, 8), 3).shape == (batch, queries, 2, 8)


def test_there_is_no_gradient(either_backend: str) -> None:
    q, keys, values = inputs(1, 2, 3, 1, 8)
    assert not ops.cached_attention(q.requires_grad_(), keys, values, 3).requires_grad


@pytest.mark.parametrize(("queries", "length"), [(1, 680), (16, 64), (17, 65), (64, 128), (130, 199)])
@pytest.mark.parametrize("dim", [1, 7, 64, 100])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_each_variant(each_isa: str, queries: int, length: int, dim: int, dtype: torch.dtype) -> None:
    q, keys, values = inputs(1, queries, length + 2, 2, dim, dtype)
    result = ops.cached_attention(q, keys, values, length, scale=-0.7)
    seen = keys[:, :length], values[:, :length]
    exact = oracle.attention(q.double(), seen[0].double(), seen[1].double(), -0.7)
    if dtype == torch.float32:
        oracle.assert_equal_up_to_rounding(result, exact)
    else:
        oracle.assert_as_good_as_torch(result, oracle.attention(q, *seen, -0.7), exact)


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_memory(each_isa: str, dtype: torch.dtype) -> None:
    """The same numbers elsewhere in memory give the same bits."""
    given = inputs(2, 33, 70, 3, 20, dtype)
    expected = ops.cached_attention(*given, 67)
    unaligned = [torch.empty(t.numel() + 1, dtype=dtype)[1:].view(t.shape).copy_(t) for t in given]
    assert torch.equal(ops.cached_attention(*unaligned, 67), expected)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in given]
    assert torch.equal(ops.cached_attention(*heads_first, 67), expected)


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("heads", [1, 3])
def test_thread_count_changes_nothing(dtype: torch.dtype, heads: int) -> None:
    given = inputs(1, 256, 680, heads, 32, dtype)
    results = []
    for count in (1, 2, 3):
        with threads(count), backend.force("native"):
            results.append(ops.cached_attention(*given, 680))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_nan_is_not_lost(each_isa: str, dtype: torch.dtype) -> None:
    for which in (0, 1, 2):
        given = inputs(1, 20, 70, 2, 20, dtype)
        given[which][0, 3, 1, 5] = torch.nan
        hit = ops.cached_attention(*given, 70)[0].isnan().any(-1)
        assert not hit[:, 0].any()
        assert hit[:, 1].tolist() == [which > 0 or query == 3 for query in range(20)]


def test_infinite_scores(each_isa: str) -> None:
    """A score of -inf weighs nothing, even if the first hundreds are so; without any other, torch has NaN."""
    q, keys, values = inputs(1, 5, 450, 1, 8)
    q[..., 0], keys[..., 0] = 1, 0
    keys[:, :300, :, 0] = -torch.inf
    result = ops.cached_attention(q, keys, values, 450)
    torch.testing.assert_close(result, ops.cached_attention(q, keys[:, 300:], values[:, 300:], 150))
    assert ops.cached_attention(q, keys, values, 300).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_registration(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.var_ext.cached_attention, (*inputs(2, 4, 9, 2, 8, dtype), 7, 1.0))


def test_the_kernel_runs_when_the_backend_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = _C.cached_attention
    monkeypatch.setattr(_C, "cached_attention", lambda *given: (calls.append(1), kernel(*given)))
    for choice in backend.CHOICES:
        with backend.force(choice):
            ops.cached_attention(*inputs(1, 2, 3, 1, 8), 3)
        assert len(calls) == 1, choice


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=zeros(4, 2, 8)), r"q must have shape \(B, Lq, H, D\), got \(4, 2, 8\)"),
        (dict(k_cache=zeros(1, 9, 3, 8)), r"k_cache must have shape \(1, Lmax, 2, 8\), got \(1, 9, 3, 8\)"),
        (dict(v_cache=zeros(1, 8, 2, 8)), r"v_cache must have shape \(1, 9, 2, 8\), got \(1, 8, 2, 8\)"),
        (dict(v_cache=zeros(1, 9, 2, 8).half()), "v_cache must be float32, got float16"),
        (dict(k_cache=zeros(1, 9, 2, 16)[..., ::2]), "k_cache must have stride 1 along D, got 2"),
        (dict(out=zeros(1, 3, 2, 8)), r"out must have shape \(1, 4, 2, 8\), got \(1, 3, 2, 8\)"),
        (dict(out=zeros(1, 4, 1, 8).expand(1, 4, 2, 8)), "out must not overlap itself"),
        (dict(length=10), r"length must be in 1\.\.9, got 10"),
        (dict(length=0), r"length must be in 1\.\.9, got 0"),
    ],
)
def test_the_kernel_refuses(change: dict[str, object], message: str) -> None:
    given = dict(zip(("q", "k_cache", "v_cache"), inputs(1, 4, 9, 2, 8), strict=True), out=zeros(1, 4, 2, 8))
    given |= dict(length=5, scale=1.0)
    given = {k: view(v) if isinstance(v, Tensor) else v for k, v in {**given, **change}.items()}
    with pytest.raises(ValueError, match=f"^cached_attention: {message}"):
        _C.cached_attention(**given)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=torch.zeros(4, 2, 8)), ValueError, r"q must have shape \(B, Lq, H, D\).*got \(4, 2, 8\)"),
        (dict(k_cache=torch.zeros(1, 9, 3, 8)), ValueError, r"k_cache must have shape.*got \(1, 9, 3, 8\)"),
        (
            dict(v_cache=torch.zeros(1, 8, 2, 8)),
            ValueError,
            r"v_cache must have shape.*\(1, 9, 2, 8\), got \(1, 8, 2, 8\)",
        ),
        (dict(length=10), ValueError, r"length must be in 1\.\.9, got 10"),
        (dict(length=0), ValueError, r"length must be in 1\.\.9, got 0"),
        (dict(k_cache=torch.zeros(1, 9, 2, 8).bfloat16()), TypeError, "one dtype, got.*k_cache bfloat16"),
        (dict(q=torch.zeros(1, 4, 2, 8).long()), TypeError, "q must be float32.*got int64"),
        (
            dict(v_cache=torch.zeros(1, 9, 2, 8, device="meta")),
            ValueError,
            "one device, got.*v_cache on meta",
        ),
    ],
)
def test_bad_input(
    either_backend: str, change: dict[str, object], error: type[Exception], message: str
) -> None:
    given = dict(zip(("q", "k_cache", "v_cache"), inputs(1, 4, 9, 2, 8), strict=True), length=5)
    with pytest.raises(error, match=f"cached_attention: .*{message}"):
        ops.cached_attention(**{**given, **change})  # type: ignore[arg-type]
