from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import oracle
from tests.ops.test_qk_norm import LAYOUTS, formula
from tests.ops.test_qk_norm import inputs as packed_inputs
from tests.threads import threads
from var_ext import _C, ScaleSchedule, backend, ops
from var_ext.ops._native import maybe_view


def inputs(
    batch: int, queries: int, room: int, heads: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, queries, heads, dim).mul(dim**-0.25).to(dtype)
    keys, values = torch.randn(2, batch, room, heads, dim).mul(dim**-0.25).to(dtype)
    return q, keys, values


def unnormed(q: Tensor, keys: Tensor, values: Tensor, length: int) -> tuple[Any, ...]:
    """Arguments that make the op attention alone: q (B, l, H, D) to the first `length` of keys, the last l of them new.

    Those are not in the cache yet.
    """
    offset, nothing = length - q.shape[1], q.new_zeros(q.shape[2:])
    new = torch.stack([q, keys[:, offset:length], values[:, offset:length]], dim=2)
    k_cache, v_cache = keys.clone(), values.clone()
    k_cache[:, offset:length] = v_cache[:, offset:length] = torch.nan
    return new, nothing, nothing, None, k_cache, v_cache, offset


def normed(
    batch: int, queries: int, length: int, room: int, heads: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """Arguments of the op, the scale of q small enough for 16 bits; past `length` and where new keys go lies NaN."""
    qkv, q_bias, v_bias, log_scale = packed_inputs((batch, queries, heads, dim), dtype)
    caches = torch.randn(2, batch, room, heads, dim).mul(dim**-0.5).to(dtype)
    caches[:, :, length - queries :] = torch.nan
    return qkv, q_bias, v_bias, log_scale / 4, *caches.unbind(0), length - queries


def by_formula(
    qkv: Tensor,
    q_bias: Tensor,
    v_bias: Tensor,
    log_scale: Tensor | None,
    k: Tensor,
    v: Tensor,
    offset: int,
    scale: float,
) -> Tensor:
    """Sums spelt out, in the dtype of the arguments."""
    q, new_k, new_v = formula(qkv, q_bias, v_bias, log_scale)
    return oracle.attention(
        q, torch.cat([k[:, :offset], new_k], dim=1), torch.cat([v[:, :offset], new_v], dim=1), scale
    )


def assert_right(result: Tensor, given: Sequence[Any], scale: float) -> None:
    """As near to float64 as torch is in the same dtype."""
    exact = by_formula(*(t.double() if isinstance(t, Tensor) else t for t in given), scale)
    oracle.assert_as_good_as_torch(result, by_formula(*given, scale), exact)


def assert_added(
    caches: Sequence[Tensor], before: Sequence[Tensor], new: Sequence[Tensor], offset: int
) -> None:
    """New entries lie from `offset` on, all else is what it was, NaN too."""
    for cache, old, want in zip(caches, before, new, strict=True):
        wanted = old.clone()
        wanted[:, offset : offset + want.shape[1]] = want
        torch.testing.assert_close(cache, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("queries", "length", "room"), [(1, 1, 1), (4, 5, 7), (22, 129, 151), (121, 151, 151), (3, 3, 9)]
)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("norm", [True, False])
def test_against_float64(
    either_backend: str, queries: int, length: int, room: int, heads: int, dtype: torch.dtype, norm: bool
) -> None:
    given = normed(2, queries, length, room, heads, 64, dtype)
    given = given if norm else unnormed(*inputs(2, queries, room, heads, 64, dtype), length)
    before = [cache.clone() for cache in given[4:6]]
    result = ops.cached_attention(*given, scale=0.7)
    assert result.is_contiguous()
    assert_right(result, (*given[:4], *before, given[6]), 0.7)
    assert_added(given[4:6], before, ops.qk_norm(*given[:4])[1:], given[6])


def test_the_rest_of_the_cache_is_never_read(either_backend: str) -> None:
    assert ops.cached_attention(*normed(1, 4, 5, 9, 2, 16)).isfinite().all()


def test_scale_by_scale_it_is_block_causal_attention(either_backend: str) -> None:
    schedule = ScaleSchedule((1, 2, 3, 4))
    qkv, *parameters = packed_inputs((2, 30, 2, 16))
    whole = ops.block_causal_attention(*ops.qk_norm(qkv, *parameters), schedule, scale=0.1)
    caches = torch.full((2, 2, 30, 2, 16), torch.nan).unbind(0)
    for s in schedule.slices:
        part = ops.cached_attention(qkv[:, s], *parameters, *caches, s.start, scale=0.1)
        # the same sums in another order: fp32 rounding
        torch.testing.assert_close(part, whole[:, s], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_layouts(either_backend: str, layout: str) -> None:
    """What a layout holds decides the result and what is written; torch may sum strided channels in another order."""
    given = normed(2, 4, 7, 9, 3, 24)
    placed = [LAYOUTS[layout](t.clone()) if isinstance(t, Tensor) else t for t in given]
    torch.testing.assert_close(
        ops.cached_attention(*placed), ops.cached_attention(*given), rtol=1e-5, atol=1e-5
    )
    for mine, wanted in zip(placed[4:6], given[4:6], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("batch", "queries"), [(0, 4), (2, 0)])
@pytest.mark.parametrize("offset", [0, 2])
def test_nothing_in_nothing_out(either_backend: str, batch: int, queries: int, offset: int) -> None:
    given = normed(batch, queries, offset + queries, 7, 2, 8)
    before = [cache.clone() for cache in given[4:6]]
    assert ops.cached_attention(*given).shape == (batch, queries, 2, 8)
    assert_added(given[4:6], before, [cache[:, :0] for cache in before], 0)


def test_there_is_no_gradient(either_backend: str) -> None:
    given = normed(1, 2, 3, 3, 1, 8)
    leaves = [t.requires_grad_() for t in given[:4]]
    assert not ops.cached_attention(*leaves, *given[4:]).requires_grad
    assert not given[4].requires_grad


def test_autograd_sees_that_a_cache_was_written(either_backend: str) -> None:
    given = normed(1, 2, 2, 4, 2, 8)
    k_cache, v_cache = torch.randn(2, 1, 4, 2, 8)
    weight = torch.randn_like(k_cache, requires_grad=True)
    product = (k_cache * weight).sum()  # keeps the cache for its gradient
    ops.cached_attention(*given[:4], k_cache, v_cache, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with pytest.raises(ValueError, match="caches must not require a gradient"):
        ops.cached_attention(*given[:4], k_cache.requires_grad_(), v_cache, 0)


@pytest.mark.parametrize(("queries", "length"), [(1, 680), (16, 64), (17, 65), (64, 128), (130, 199)])
@pytest.mark.parametrize("dim", [1, 7, 64, 100])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_each_variant(each_isa: str, queries: int, length: int, dim: int, dtype: torch.dtype) -> None:
    q, keys, values = inputs(1, queries, length + 2, 2, dim, dtype)
    result = ops.cached_attention(*unnormed(q, keys, values, length), scale=-0.7)
    seen = keys[:, :length], values[:, :length]
    exact = oracle.attention(q.double(), seen[0].double(), seen[1].double(), -0.7)
    if dtype == torch.float32:
        oracle.assert_equal_up_to_rounding(result, exact)
    else:
        oracle.assert_as_good_as_torch(result, oracle.attention(q, *seen, -0.7), exact)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_in_one_call_as_in_two(each_isa: str, dtype: torch.dtype, norm: bool) -> None:
    """The bits of `qk_norm` and of attention to what it gave."""
    given = normed(2, 70, 101, 102, 3, 64, dtype)
    given = given if norm else (*given[:3], None, *given[4:])
    before = [cache.clone() for cache in given[4:6]]
    result = ops.cached_attention(*given, scale=0.3)
    q, k, v = ops.qk_norm(*given[:4])
    assert_added(given[4:6], before, (k, v), 31)
    assert torch.equal(result, ops.cached_attention(*unnormed(q, *given[4:6], 101), scale=0.3))


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_memory(each_isa: str, dtype: torch.dtype) -> None:
    """The same numbers elsewhere in memory give the same bits."""
    given = normed(2, 33, 67, 70, 3, 20, dtype)
    expected = ops.cached_attention(*given)
    unaligned = [oracle.unaligned(t) if isinstance(t, Tensor) else t for t in given]
    assert torch.equal(ops.cached_attention(*unaligned), expected)
    heads_first = [
        t.transpose(-3, -2).contiguous().transpose(-3, -2) if isinstance(t, Tensor) and t.ndim > 2 else t
        for t in given
    ]
    assert torch.equal(ops.cached_attention(*heads_first), expected)


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("heads", [1, 3])
def test_thread_count_changes_nothing(dtype: torch.dtype, heads: int) -> None:
    given = normed(1, 256, 680, 680, heads, 32, dtype)
    results = []
    for count in (1, 2, 3):
        with threads(count), backend.force("native"):
            results.append(ops.cached_attention(*given))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_nan_is_not_lost(each_isa: str, dtype: torch.dtype) -> None:
    for which in (0, 1, 2):
        given = inputs(1, 20, 70, 2, 20, dtype)
        given[which][0, 3, 1, 5] = torch.nan
        hit = ops.cached_attention(*unnormed(*given, 70))[0].isnan().any(-1)
        assert not hit[:, 0].any()
        assert hit[:, 1].tolist() == [which > 0 or query == 3 for query in range(20)]


def test_infinite_scores(each_isa: str) -> None:
    """A score of -inf weighs nothing, even if the first hundreds are so; without any other, torch has NaN."""
    q, keys, values = inputs(1, 5, 450, 1, 8)
    q[..., 0], keys[..., 0] = 1, 0
    keys[:, :300, :, 0] = -torch.inf
    result = ops.cached_attention(*unnormed(q, keys, values, 450))
    later = unnormed(q, keys[:, 300:], values[:, 300:], 150)
    torch.testing.assert_close(result, ops.cached_attention(*later))
    assert ops.cached_attention(*unnormed(q, keys, values, 300)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_registration(dtype: torch.dtype) -> None:
    for log_scale in (torch.zeros(2, dtype=dtype), None):
        given = normed(2, 4, 7, 7, 2, 8, dtype)
        torch.library.opcheck(torch.ops.var_ext.cached_attention, (*given[:3], log_scale, *given[4:], 1.0))


@pytest.mark.parametrize("log_scale", [torch.zeros(2), None])
def test_compiled(log_scale: Tensor | None) -> None:
    """A graph knows that the caches change: what reads them before and after sees both."""
    qkv, q_bias, v_bias, _, k_cache, v_cache, offset = normed(2, 4, 7, 7, 2, 8)
    k_cache[:, offset:] = 0

    def read_around(qkv: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, ...]:
        before = k_cache.sum()
        out = ops.cached_attention(qkv, q_bias, v_bias, log_scale, k_cache, v_cache, offset)
        return before, out, k_cache.sum()

    caches = k_cache.clone(), v_cache.clone()
    wanted = read_around(qkv, k_cache, v_cache)
    compiled: Any = torch.compile(read_around, fullgraph=True, backend="aot_eager")
    for mine, want in zip(compiled(qkv, *caches), wanted, strict=True):
        assert torch.equal(mine, want)
    assert torch.equal(caches[0], k_cache) and torch.equal(caches[1], v_cache)


def test_the_kernel_runs_when_the_backend_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = _C.cached_attention
    monkeypatch.setattr(_C, "cached_attention", lambda *given: (calls.append(1), kernel(*given)))
    for choice in backend.CHOICES:
        with backend.force(choice):
            ops.cached_attention(*normed(1, 2, 3, 3, 1, 8))
        assert len(calls) == 1, choice


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def plain() -> dict[str, Any]:
    return dict(
        qkv=zeros(1, 4, 3, 2, 8), q_bias=zeros(2, 8), v_bias=zeros(2, 8), log_scale=zeros(2),
        k_cache=zeros(1, 9, 2, 8), v_cache=zeros(1, 9, 2, 8), offset=5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(qkv=zeros(4, 3, 2, 8)), r"qkv must have shape \(B, l, 3, H, D\), got \(4, 3, 2, 8\)"),
        (dict(qkv=zeros(1, 4, 3, 2, 16)[..., ::2]), "qkv must have contiguous channels, got stride 2"),
        (dict(v_bias=zeros(16)), r"v_bias must have shape \(2, 8\), got \(16,\)"),
        (dict(log_scale=zeros(3)), r"log_scale must have shape \(2,\), got \(3,\)"),
        (dict(k_cache=zeros(1, 9, 3, 8)), r"k_cache must have shape \(1, Lmax, 2, 8\), got \(1, 9, 3, 8\)"),
        (dict(v_cache=zeros(1, 8, 2, 8)), r"v_cache must have shape \(1, 9, 2, 8\), got \(1, 8, 2, 8\)"),
        (dict(v_cache=zeros(1, 9, 2, 8).half()), "v_cache must be float32, got float16"),
        (dict(k_cache=zeros(1, 9, 2, 16)[..., ::2]), "k_cache must have stride 1 along D, got 2"),
        (dict(k_cache=zeros(1, 1, 2, 8).expand(1, 9, 2, 8)), "k_cache must not overlap itself"),
        (dict(out=zeros(1, 3, 2, 8)), r"out must have shape \(1, 4, 2, 8\), got \(1, 3, 2, 8\)"),
        (dict(out=zeros(1, 4, 1, 8).expand(1, 4, 2, 8)), "out must not overlap itself"),
        (dict(offset=6), "offset must leave room for 4 tokens in 9, got 6"),
        (dict(offset=-1), "offset must leave room for 4 tokens in 9, got -1"),
    ],
)
def test_the_kernel_refuses(change: dict[str, Any], message: str) -> None:
    given = {**plain(), **dict(out=zeros(1, 4, 2, 8), scale=1.0), **change}
    given = {name: maybe_view(t) if isinstance(t, Tensor) else t for name, t in given.items()}
    with pytest.raises(ValueError, match=f"^cached_attention: {message}"):
        _C.cached_attention(**given)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            dict(qkv=zeros(4, 3, 2, 8)),
            ValueError,
            r"qkv must have shape \(B, l, 3, H, D\).*got \(4, 3, 2, 8\)",
        ),
        (dict(qkv=zeros(1, 4, 2, 2, 8)), ValueError, r"qkv must have shape.*got \(1, 4, 2, 2, 8\)"),
        (dict(q_bias=zeros(16)), ValueError, r"q_bias must have shape \(H, D\) = \(2, 8\), got \(16,\)"),
        (dict(v_bias=zeros(8, 2)), ValueError, r"v_bias must have shape.*got \(8, 2\)"),
        (dict(log_scale=zeros(3)), ValueError, r"log_scale must have shape \(H,\) = \(2\), got \(3,\)"),
        (dict(k_cache=zeros(1, 9, 3, 8)), ValueError, r"k_cache must have shape.*got \(1, 9, 3, 8\)"),
        (dict(k_cache=zeros(2, 9, 2, 8)), ValueError, r"k_cache must have shape.*got \(2, 9, 2, 8\)"),
        (
            dict(v_cache=zeros(1, 8, 2, 8)),
            ValueError,
            r"v_cache must have shape.*\(1, 9, 2, 8\), got \(1, 8, 2, 8\)",
        ),
        (dict(offset=6), ValueError, "offset must leave room for 4 tokens in 9, got 6"),
        (dict(offset=-1), ValueError, "offset must leave room for 4 tokens in 9, got -1"),
        (dict(k_cache=zeros(1, 9, 2, 8).bfloat16()), TypeError, "one dtype, got.*k_cache bfloat16"),
        (dict(v_bias=zeros(2, 8).half()), TypeError, "one dtype, got.*v_bias float16"),
        (dict(qkv=zeros(1, 4, 3, 2, 8).long()), TypeError, "qkv must be float32.*got int64"),
        (
            dict(v_cache=torch.zeros(1, 9, 2, 8, device="meta")),
            ValueError,
            "one device, got.*v_cache on meta",
        ),
    ],
)
def test_bad_input(either_backend: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"cached_attention: .*{message}"):
        ops.cached_attention(**{**plain(), **change})
