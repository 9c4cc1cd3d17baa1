from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.ops import oracle
from tests.ops.test_cached_attention import inputs
from var_ext import ScaleSchedule, ops
from var_ext.ops._native import kernels, view

# Queries of less than a warp's rows, of a tile, of more; keys of less than a tile, of whole ones, of one more
COUNTS = [
    (1, 1, 1),
    (4, 5, 7),
    (22, 129, 151),
    (121, 151, 151),
    (3, 1, 9),
    (1, 680, 682),
    (17, 65, 66),
    (64, 128, 130),
]


def attend(gpu: Gpu, q: Tensor, keys: Tensor, values: Tensor, length: int, scale: float = 1.0) -> Tensor:
    return ops.cached_attention(gpu(q), gpu(keys), gpu(values), length, scale=scale).cpu()


def assert_right(result: Tensor, q: Tensor, keys: Tensor, values: Tensor, length: int, scale: float) -> None:
    """As near to float64 as torch is in the same dtype."""
    keys, values = keys[:, :length], values[:, :length]
    exact = oracle.attention(q.double(), keys.double(), values.double(), scale)
    oracle.assert_as_good_as_torch(result, oracle.attention(q, keys, values, scale), exact)


@pytest.mark.parametrize(("queries", "length", "room"), COUNTS)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_against_float64(
    gpu: Gpu, queries: int, length: int, room: int, heads: int, dtype: torch.dtype
) -> None:
    given = inputs(2, queries, room, heads, 64, dtype)
    result = attend(gpu, *given, length, 0.7)
    assert result.is_contiguous()
    assert_right(result, *given, length, 0.7)


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_each_head_size(gpu: Gpu, dim: int, dtype: torch.dtype, scale: float) -> None:
    """In small tiles, and in the large ones that grids which fill the chip take."""
    given = inputs(1, 130, 200, 2, dim, dtype)
    result = attend(gpu, *given, 199, scale)
    assert_right(result, *given, 199, scale)
    heads = 2 if gpu.level == "emulated" else 512
    with gpu.of_one_multiprocessor():
        wide = [t[:, :, :1].expand(-1, -1, heads, -1) for t in given]
        assert torch.equal(attend(gpu, *wide, 199, scale), result[:, :, :1].expand(-1, -1, heads, -1))


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_the_rest_of_the_cache_is_never_read(gpu: Gpu, dtype: torch.dtype) -> None:
    q, keys, values = inputs(1, 20, 99, 2, 32, dtype)
    before = attend(gpu, q, keys, values, 69)
    keys[:, 69:], values[:, 69:] = torch.nan, torch.nan
    assert torch.equal(attend(gpu, q, keys, values, 69), before)


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_scale_by_scale_it_is_block_causal_attention(gpu: Gpu, dtype: torch.dtype) -> None:
    """Bit by bit where a scale has tiles of its own: rows meet the same tiles of keys in the same order."""
    schedule = ScaleSchedule((1, 2, 3, 4, 9))
    q, k, v = inputs(2, 111, 111, 2, 32, dtype)
    whole = ops.block_causal_attention(gpu(q), gpu(k), gpu(v), schedule).cpu()
    for s in schedule.slices:
        scale = attend(gpu, q[:, s], k, v, s.stop)
        torch.testing.assert_close(scale.float(), whole[:, s].float(), rtol=1e-2, atol=1e-2)
    assert torch.equal(scale, whole[:, s])


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_memory(gpu: Gpu, dtype: torch.dtype) -> None:
    """The same numbers elsewhere in memory give the same bits."""
    given = inputs(2, 33, 70, 3, 32, dtype)
    expected = attend(gpu, *given, 67)
    assert torch.equal(attend(gpu, *map(oracle.unaligned, given), 67), expected)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in given]
    assert torch.equal(attend(gpu, *heads_first, 67), expected)
    strided = [torch.stack([t, -t], dim=-1)[..., 0] for t in given]
    assert torch.equal(attend(gpu, *strided, 67), expected)


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_not_lost(gpu: Gpu, dtype: torch.dtype, which: int) -> None:
    given = inputs(1, 20, 70, 2, 32, dtype)
    given[which][0, 3, 1, 5] = torch.nan
    hit = attend(gpu, *given, 70)[0].isnan().any(-1)
    assert not hit[:, 0].any()
    assert hit[:, 1].tolist() == [which > 0 or query == 3 for query in range(20)]


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_infinite_scores(gpu: Gpu, dtype: torch.dtype) -> None:
    """A score of -inf weighs nothing, even if the first hundreds are so; without any other, torch has NaN."""
    q, keys, values = inputs(1, 5, 450, 1, 32, dtype)
    q[..., 0], keys[..., 0] = 1, 0
    keys[:, :300, :, 0] = -torch.inf
    result = attend(gpu, q, keys, values, 450)
    # other tiles of keys, other roundings
    torch.testing.assert_close(
        result, attend(gpu, q, keys[:, 300:], values[:, 300:], 150), rtol=2e-2, atol=2e-3
    )
    assert attend(gpu, q, keys, values, 300).isnan().all()


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_the_order_of_threads_changes_no_bit(gpu: Gpu, dtype: torch.dtype) -> None:
    given = inputs(1, 70, 140, 2, 64, dtype)
    runs = []
    for seed in range(3):
        if gpu.level == "emulated":
            emulation.emulator().seed(seed)
        runs.append(attend(gpu, *given, 137))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_the_largest_cache(gpu: Gpu, dtype: torch.dtype) -> None:
    """1024 queries, 16384 keys: the first tile and the last, on the emulator."""
    q, keys, values = inputs(1, 1024, 16384, 1, 32, dtype)
    out = gpu(torch.full_like(q, torch.nan))
    with gpu.sampled(2):
        kernels(out).cached_attention(view(gpu(q)), view(gpu(keys)), view(gpu(values)), view(out), 16384, 1.0)
    for query in (0, 31, 1023):
        result, one = out.cpu()[:, query : query + 1], q[:, query : query + 1]
        assert_right(result, one, keys, values, 16384, 1.0)


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_offsets_beyond_32_bits(gpu: Gpu, dtype: torch.dtype) -> None:
    if gpu.level != "emulated":
        pytest.skip("moves 4 GB and more, of which the emulator touches a few pages")
    given = inputs(2, 3, 5, 2, 32, dtype)
    far = 2**31

    def spread(x: Tensor) -> Tensor:
        place = torch.empty(far + x[0].numel(), dtype=x.dtype)
        return place.as_strided(x.shape, (far, *x.stride()[1:])).copy_(x)

    assert torch.equal(attend(gpu, *map(spread, given), 4), attend(gpu, *given, 4))


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_no_bank_conflicts(traced: Gpu, dim: int, dtype: torch.dtype) -> None:
    attend(traced, *inputs(1, 70, 140, 1, dim, dtype), 137)
    with traced.of_one_multiprocessor():
        attend(traced, *inputs(1, 70, 140, 2, dim, dtype), 137)
    assert traced.conflicts() == []


@pytest.mark.parametrize(("batch", "queries"), [(0, 4), (2, 0)])
def test_nothing_in_nothing_out(gpu: Gpu, batch: int, queries: int) -> None:
    assert attend(gpu, *inputs(batch, queries, 5, 2, 32), 3).shape == (batch, queries, 2, 32)


def test_refusals(gpu: Gpu) -> None:
    def refused(message: str, **change: Any) -> None:
        given: dict[str, Any] = dict(
            zip(("q", "k_cache", "v_cache"), inputs(1, 4, 9, 2, 32), strict=True), length=5
        )
        given = {**given, **change}
        with pytest.raises(ValueError, match=f"^cached_attention: {message}"):
            ops.cached_attention(
                **{name: gpu(t) if isinstance(t, Tensor) else t for name, t in given.items()}
            )

    q, keys, values = inputs(1, 4, 9, 2, 20)
    refused("q must have a D of 32, 64 or 128 on CUDA, got 20", q=q, k_cache=keys, v_cache=values)
    refused(r"length must be in 1\.\.9, got 10", length=10)
    whole, even = gpu(torch.zeros(1, 5, 2, 33)), gpu(torch.zeros(1, 5, 2, 32))
    for i, name in enumerate(("q", "k", "v")):
        given = [view(whole[..., 1:] if i == j else even) for j in range(3)]
        with pytest.raises(
            ValueError, match=f"{name}.* must have rows that begin at multiples of 16 bytes on CUDA"
        ):
            kernels(even).cached_attention(*given, view(even), 5, 1.0)


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_strides_of_axes_of_one(gpu: Gpu, dtype: torch.dtype) -> None:
    """They mean nothing, and need not be multiples of 16 bytes."""
    q, keys, values = inputs(1, 1, 7, 1, 32, dtype)
    odd = q.as_strided(q.shape, (33, 33, 33, 1))
    assert torch.equal(attend(gpu, odd, keys, values, 7), attend(gpu, q, keys, values, 7))
