from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda.attention import HEAD_SIZES, cached, far_apart, moved
from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.ops import oracle
from tests.ops.test_cached_attention import assert_added, assert_right, inputs, normed, plain, unnormed
from tests.ops.test_qk_norm import LAYOUTS
from var_ext import ScaleSchedule, ops
from var_ext.ops._native import kernels, maybe_view, view

# Queries of less than a warp's rows, of a tile, of the large one, of more; keys of less than a tile, of whole ones, of
# one more
COUNTS = [
    (1, 1, 1),
    (4, 5, 7),
    (22, 129, 151),
    (121, 151, 151),
    (3, 3, 9),
    (1, 680, 682),
    (17, 65, 66),
    (64, 128, 130),
    (65, 65, 65),
    (128, 200, 200),
    (129, 129, 130),
]


def run(gpu: Gpu, given: tuple[Any, ...], scale: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    """The result, and the caches after it."""
    placed = moved(gpu, [t.clone() if isinstance(t, Tensor) else t for t in given])
    result = ops.cached_attention(*placed, scale=scale)
    return result.cpu(), [cache.cpu() for cache in placed[4:6]]


@pytest.mark.parametrize(("queries", "length", "room"), COUNTS)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_against_float64(
    gpu: Gpu, queries: int, length: int, room: int, heads: int, dtype: torch.dtype
) -> None:
    """What lies past the new entries is NaN: it is not read."""
    given = normed(2, queries, length, room, heads, 64, dtype)
    result, caches = run(gpu, given, 0.7)
    assert result.is_contiguous()
    assert_right(result, given, 0.7)
    assert_added(caches, given[4:6], ops.qk_norm(*moved(gpu, given[:4]))[1:], given[6])


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_each_head_size(gpu: Gpu, dim: int, dtype: torch.dtype, scale: float) -> None:
    """In small tiles, and in the large ones that grids which fill the chip take."""
    q, keys, values = inputs(1, 130, 200, 2, dim, dtype)
    given = unnormed(q, keys, values, 199)
    result = run(gpu, given, scale)[0]
    assert_right(result, given, scale)
    heads = 2 if gpu.level == "emulated" else 512
    with gpu.of_one_multiprocessor():
        wide = [t[:, :, :1].expand(-1, -1, heads, -1) for t in (q, keys, values)]
        assert torch.equal(cached(gpu, *wide, 199, scale), result[:, :, :1].expand(-1, -1, heads, -1))


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize(
    ("queries", "norm"),
    [
        (1, True),
        pytest.param(63, False, marks=pytest.mark.slow),
        (64, True),
        (65, False),
        pytest.param(100, True, marks=pytest.mark.slow),
        pytest.param(128, True, marks=pytest.mark.slow),
        (129, False),
    ],
)
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_in_one_call_as_in_two(gpu: Gpu, queries: int, dim: int, dtype: torch.dtype, norm: bool) -> None:
    """The bits of `qk_norm` in the cache, and of attention to what it gave."""
    given = normed(2, queries, 70 + queries, 201, 2, dim, dtype)
    given = given if norm else (*given[:3], None, *given[4:])
    result, caches = run(gpu, given, 0.3)
    q, k, v = (t.cpu() for t in ops.qk_norm(*moved(gpu, given[:4])))
    assert_added(caches, given[4:6], (k, v), 70)
    assert torch.equal(result, cached(gpu, q, *caches, 70 + queries, 0.3))


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_scale_by_scale_it_is_block_causal_attention(gpu: Gpu, dtype: torch.dtype) -> None:
    """Bit by bit where a scale has tiles of its own: rows meet the same tiles of keys in the same order."""
    schedule = ScaleSchedule((1, 2, 3, 4, 9))
    given = normed(2, 111, 111, 111, 2, 32, dtype)
    qkv, *parameters = moved(gpu, given[:4])
    whole = ops.block_causal_attention(*ops.qk_norm(qkv, *parameters), schedule).cpu()
    caches = moved(gpu, given[4:6])
    for s in schedule.slices:
        part = ops.cached_attention(qkv[:, s], *parameters, *caches, s.start).cpu()
        torch.testing.assert_close(part.float(), whole[:, s].float(), rtol=1e-2, atol=1e-2)
    assert torch.equal(part, whole[:, s])


@pytest.mark.parametrize("queries", [33, 70])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_layouts(gpu: Gpu, layout: str, dtype: torch.dtype, queries: int) -> None:
    """The same numbers elsewhere in memory give the same bits; the op copies what has no aligned rows."""
    given = normed(2, queries, queries + 34, queries + 37, 3, 32, dtype)
    expected, wanted = run(gpu, given)
    placed = moved(gpu, [LAYOUTS[layout](t.clone()) if isinstance(t, Tensor) else t for t in given])
    assert torch.equal(ops.cached_attention(*placed).cpu(), expected)
    for mine, want in zip(placed[4:6], wanted, strict=True):
        torch.testing.assert_close(mine.cpu(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("off", [0, 1, 2])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_unaligned_qkv_and_biases(gpu: Gpu, dtype: torch.dtype, off: int) -> None:
    """The kernel itself on each as it lies: norms of one element a lane, then attention."""
    given = normed(2, 5, 9, 9, 3, 32, dtype)
    placed = moved(gpu, [oracle.unaligned(t) if i == off else t for i, t in enumerate(given[:4])])
    caches, out = moved(gpu, [c.clone() for c in given[4:6]]), gpu(torch.empty(2, 5, 3, 32, dtype=dtype))
    kernels(out).cached_attention(*map(maybe_view, (*placed, *caches, out)), 4, 1.0)
    assert_right(out.cpu(), given, 1.0)


@pytest.mark.parametrize("queries", [20, 70])
@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_not_lost(gpu: Gpu, dtype: torch.dtype, which: int, queries: int) -> None:
    given = inputs(1, queries, 70, 2, 32, dtype)
    given[which][0, 3, 1, 5] = torch.nan
    hit = cached(gpu, *given, 70)[0].isnan().any(-1)
    assert not hit[:, 0].any()
    assert hit[:, 1].tolist() == [which > 0 or query == 3 for query in range(queries)]


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_infinite_scores(gpu: Gpu, dtype: torch.dtype) -> None:
    """A score of -inf weighs nothing, even if the first hundreds are so; without any other, torch has NaN."""
    q, keys, values = inputs(1, 5, 450, 1, 32, dtype)
    q[..., 0], keys[..., 0] = 1, 0
    keys[:, :300, :, 0] = -torch.inf
    result = cached(gpu, q, keys, values, 450)
    # other tiles of keys, other roundings
    torch.testing.assert_close(
        result, cached(gpu, q, keys[:, 300:], values[:, 300:], 150), rtol=2e-2, atol=2e-3
    )
    assert cached(gpu, q, keys, values, 300).isnan().all()


@pytest.mark.parametrize("queries", [40, 70, 130])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_the_order_of_threads_changes_no_bit(gpu: Gpu, dtype: torch.dtype, queries: int) -> None:
    given, runs = normed(1, queries, 137, 140, 2, 64, dtype), []
    for seed in range(3):
        if gpu.level == "emulated":
            emulation.emulator().seed(seed)
        result, caches = run(gpu, given)
        runs.append([result, *(cache[:, :137] for cache in caches)])
    assert all(torch.equal(a, b) for later in runs[1:] for a, b in zip(later, runs[0], strict=True))


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_the_largest_cache(gpu: Gpu, dtype: torch.dtype) -> None:
    """1024 queries, 16384 keys: the first tile and the last, on the emulator."""
    q, keys, values = inputs(1, 1024, 16384, 1, 32, dtype)
    *given, offset = unnormed(q, keys, values, 16384)
    caches = keys.clone(), values.clone()  # with what other blocks would write
    placed, out = moved(gpu, [*given[:4], *caches]), gpu(torch.full_like(q, torch.nan))
    with gpu.sampled(2):
        kernels(out).cached_attention(*map(maybe_view, placed), view(out), offset, 1.0)
    for query in (0, 31, 1023):
        one = q[:, query : query + 1]
        exact = oracle.attention(one.double(), keys.double(), values.double(), 1.0)
        torchs = oracle.attention(one, keys, values, 1.0)
        oracle.assert_as_good_as_torch(out.cpu()[:, query : query + 1], torchs, exact)


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_offsets_beyond_32_bits(gpu: Gpu, dtype: torch.dtype) -> None:
    if gpu.level != "emulated":
        pytest.skip("moves 4 GB and more, of which the emulator touches a few pages")
    given = normed(2, 3, 5, 5, 2, 32, dtype)
    apart = [far_apart(t) if isinstance(t, Tensor) and t.ndim > 2 else t for t in given]
    assert torch.equal(ops.cached_attention(*apart), ops.cached_attention(*given))
    assert all(torch.equal(apart[i], given[i]) for i in (4, 5))


@pytest.mark.parametrize("queries", [40, 70, 130])
@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_no_bank_conflicts(traced: Gpu, dim: int, dtype: torch.dtype, queries: int) -> None:
    run(traced, normed(1, queries, 137, 140, 1, dim, dtype))
    with traced.of_one_multiprocessor():
        run(traced, normed(1, queries, 137, 140, 2, dim, dtype))
    assert traced.conflicts() == []


@pytest.mark.parametrize(("batch", "queries"), [(0, 4), (2, 0)])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_nothing_in_nothing_out(gpu: Gpu, batch: int, queries: int, dtype: torch.dtype) -> None:
    result, _ = run(gpu, normed(batch, queries, queries, 5, 2, 32, dtype))
    assert result.shape == (batch, queries, 2, 32)


def test_refusals(gpu: Gpu) -> None:
    def refused(message: str, given: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"^cached_attention: {message}"):
            ops.cached_attention(**dict(zip(given, moved(gpu, [*given.values()]), strict=True)))

    refused("D must be 32, 64 or 128 on CUDA, got 8", plain())
    refused("offset must leave room for 4 tokens in 9, got 6", {**plain(), "offset": 6})
    whole, even = gpu(torch.zeros(1, 5, 2, 33)), gpu(torch.zeros(1, 5, 2, 32))
    qkv, bias = gpu(torch.zeros(1, 5, 3, 2, 32)), gpu(torch.zeros(2, 32))
    for i, name in enumerate(("k_cache", "v_cache", "out")):
        outputs = [whole[..., 1:] if i == j else even for j in range(3)]
        given = qkv, bias, bias, None, *outputs
        with pytest.raises(
            ValueError, match=f"{name} must have rows that begin at multiples of 16 bytes on CUDA"
        ):
            kernels(even).cached_attention(*map(maybe_view, given), 0, 1.0)


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_strides_of_axes_of_one(gpu: Gpu, dtype: torch.dtype) -> None:
    """They mean nothing, and need not be multiples of 16 bytes."""
    given = normed(1, 1, 7, 7, 1, 32, dtype)
    expected, _ = run(gpu, given)
    qkv = given[0].as_strided(given[0].shape, (97, 97, 32, 33, 1))
    assert torch.equal(ops.cached_attention(*moved(gpu, [qkv, *given[1:]])).cpu(), expected)
