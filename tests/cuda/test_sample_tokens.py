"""The CUDA kernel draws the CPU kernel's tokens, all of them: sums are of integers, and every fp32 step is the same.

VAR_EXT_SAMPLE_ROWS=100000 compares as many random rows in `test_random_rows` as the kernels' issue asks for; without it
fewer, as many as a test run has time for.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.ops import oracle
from tests.ops.test_sample_tokens import KINDS, rows
from var_ext import _C, ops
from var_ext.ops._native import kernels, view

ROWS = int(os.environ.get("VAR_EXT_SAMPLE_ROWS", "20000"))
SIZES = [1, 2, 5, 33, 50, 511, 513, 4096, 4099]  # below a warp's load, around it, beyond; not of whole groups


def on_cpu(
    logits: Tensor, seeds: Tensor, *, scale_index: int = 0, cfg: Any = None, top_k: Any = 0, top_p: Any = 0.0
) -> Tensor:
    """The CPU kernel's tokens."""
    out = torch.empty(len(seeds), logits.shape[1], dtype=torch.int64)
    values = [view(v) if isinstance(v, Tensor) else v for v in (cfg, top_k, top_p)]
    _C.sample_tokens(view(logits), view(seeds), view(out), scale_index, *values)
    return out


def on_gpu(gpu: Gpu, logits: Tensor, seeds: Tensor, **given: Any) -> Tensor:
    given = {name: gpu(value) if isinstance(value, Tensor) else value for name, value in given.items()}
    return ops.sample_tokens(gpu(logits), gpu(seeds), **{"scale_index": 0, **given}).cpu()


def assert_same(gpu: Gpu, logits: Tensor, seeds: Tensor, **given: Any) -> None:
    tokens, expected = on_gpu(gpu, logits, seeds, **given), on_cpu(logits, seeds, **given)
    assert torch.equal(tokens, expected), (tuple(logits.shape), given)


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("vocabulary", SIZES)
def test_filters(gpu: Gpu, vocabulary: int, dtype: torch.dtype) -> None:
    """Each top_k with each top_p, every second with guidance."""
    i = 0
    for top_k in (0, 1, 3, 900, vocabulary, vocabulary + 7):
        for top_p in (0.0, 1e-9, 0.5, 0.96, 1.0):
            i += 1
            if vocabulary > 600 and i % 3 > 0:
                continue
            cfg = None if i % 2 == 0 else 1.5
            logits = (torch.randn(2 if cfg is None else 4, 2, vocabulary) * 3).to(dtype)
            assert_same(gpu, logits, torch.tensor([i, -i]), scale_index=i, cfg=cfg, top_k=top_k, top_p=top_p)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_all_kinds(gpu: Gpu, kind: str) -> None:
    for i, vocabulary in enumerate((17, 200, 1000)):
        logits, seeds = rows(kind, vocabulary), torch.arange(4)
        for top_k, top_p in ((0, 0.0), (0, 0.9), (vocabulary // 4, 0.0), (vocabulary // 2, 0.96)):
            assert_same(gpu, logits, seeds, scale_index=i, top_k=top_k, top_p=top_p)
            if kind != "far apart":  # guidance overflows there
                assert_same(gpu, logits, seeds[:2], scale_index=i, cfg=1.5, top_k=top_k, top_p=top_p)


@pytest.mark.parametrize("cfg", [None, 1.5])
def test_published_settings(gpu: Gpu, cfg: float | None) -> None:
    logits = torch.randn(2 if cfg is None else 4, 10, 4096) * 3
    assert_same(gpu, logits, torch.tensor([3, 2**62]), scale_index=9, cfg=cfg, top_k=900, top_p=0.96)


@pytest.mark.parametrize("vocabulary", [16384, 16387])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows(gpu: Gpu, vocabulary: int, dtype: torch.dtype) -> None:
    """The longest in registers, and one that is read again for each step."""
    logits = (torch.randn(2, 1, vocabulary) * 3).to(dtype)
    assert_same(gpu, logits, torch.arange(2), top_k=900, top_p=0.96)
    assert_same(gpu, logits, torch.arange(1), cfg=1.5, top_p=0.5)
    assert_same(
        gpu, torch.zeros(1, 1, vocabulary, dtype=dtype), torch.tensor([5]), top_k=2
    )  # the largest sum
    last = torch.full((1, 1, vocabulary), -math.inf, dtype=dtype)
    last[..., -1] = 0
    assert on_gpu(gpu, last, torch.tensor([5])).item() == vocabulary - 1


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize(
    "largest", [-3e38, -1e5, -975.0, -256.0, -7.0, -1e-39, 0.0, 1e-39, 12.0, 256.0, 1e5, 3e38]
)
def test_weights_that_vanish(gpu: Gpu, dtype: torch.dtype, largest: float) -> None:
    """Where a bracket for top-k ends: 25 below the largest, whatever the dtype makes of that."""
    if dtype == torch.float16:
        largest = max(-6e4, min(largest, 6e4))
    logits = largest - torch.linspace(0, 30, 61).repeat(1, 5, 1)
    logits = logits.clamp(*(torch.finfo(dtype).min, torch.finfo(dtype).max)).to(dtype)
    for top_k in (0, 1, 20, 45, 60):
        assert_same(gpu, logits, torch.tensor([top_k]), top_k=top_k, top_p=0.999)


def test_every_draw_of_a_flat_row(gpu: Gpu) -> None:
    """Targets all over the row, its last element among them: the borders between threads, warps and groups."""
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(gpu, torch.zeros(1, 300, 1100, dtype=dtype), torch.tensor([1]))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 3, 2**63 - 1, -(2**63)])
def test_seeds(gpu: Gpu, seed: int) -> None:
    logits = torch.randn(1, 20, 40)
    for scale_index in (0, 9, 2**32 - 1):
        assert_same(gpu, logits, torch.tensor([seed]), scale_index=scale_index)


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("cfg", [None, 1.5])
def test_memory_of_any_kind(gpu: Gpu, dtype: torch.dtype, cfg: float | None) -> None:
    plain = torch.randn(4, 5, 701).to(dtype)
    seeds = torch.arange(4 if cfg is None else 2)
    filters: dict[str, Any] = dict(scale_index=2, cfg=cfg, top_k=200, top_p=0.9)
    expected = on_cpu(plain, seeds, **filters)
    padded = torch.full((4, 5, 720), torch.nan, dtype=dtype)
    padded[..., 8:-11] = plain
    shifted = torch.full((4, 5, 720), torch.nan, dtype=dtype)
    shifted[..., 1:-18] = plain
    halves = torch.full((2, 2 * 5 * 704 + 1), torch.nan, dtype=dtype)  # the second half off the alignment
    apart = halves.as_strided((4, 5, 701), (5 * 704 + 1, 704, 1)).copy_(plain)
    views = [
        padded[..., 8:-11],  # aligned, between NaNs
        shifted[..., 1:-18],
        apart,
        plain.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        torch.stack([plain, plain * torch.nan], dim=-1)[..., 0],
        plain[:, :1].expand(-1, 5, -1),
    ]
    for logits in views[:-1]:
        assert torch.equal(on_gpu(gpu, logits, seeds, **filters), expected)
    assert_same(gpu, views[-1], seeds, **filters)
    out, given, twice = gpu(torch.full((len(seeds), 10), -7)), gpu(plain), gpu(seeds.repeat_interleave(2))
    kernels(given).sample_tokens(view(given), view(twice[::2]), view(out[:, ::2]), 2, cfg, 200, 0.9)
    assert torch.equal(out[:, ::2].cpu(), expected)
    assert (out[:, 1::2] == -7).all()


def test_offsets_beyond_32_bits(gpu: Gpu) -> None:
    if gpu.level != "emulated":
        pytest.skip("spans 4 GB, of which the emulator touches a few pages")
    plain, far = torch.randn(2, 2, 50).bfloat16(), 2**31 + 8
    logits = torch.empty(far + 100, dtype=torch.bfloat16).as_strided((2, 2, 50), (far, 50, 1)).copy_(plain)
    for cfg, seeds in ((None, torch.arange(2)), (1.5, torch.arange(1))):
        filters: dict[str, Any] = dict(cfg=cfg, top_k=20, top_p=0.9)
        assert torch.equal(on_gpu(gpu, logits, seeds, **filters), on_cpu(plain, seeds, **filters))


@pytest.mark.parametrize("vocabulary", [1, 17, 600, 16390])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_rows_that_are_no_distribution(gpu: Gpu, vocabulary: int, dtype: torch.dtype) -> None:
    """The CPU throws; here such a row alone gets -1."""
    for at in {0, vocabulary // 2, vocabulary - 1}:
        logits = torch.zeros(1, 3, vocabulary, dtype=dtype)
        logits[0, 0, at], logits[0, 1, at] = math.nan, math.inf
        tokens = on_gpu(gpu, logits, torch.tensor([1]), top_k=100)
        assert tokens[0, :2].tolist() == [-1, -1]
        fine = on_cpu(logits[:, 2:].expand(-1, 3, -1), torch.tensor([1]))
        assert tokens[0, 2] == fine[0, 2]
    nothing = torch.full((1, 2, vocabulary), -math.inf, dtype=dtype)
    assert (on_gpu(gpu, nothing, torch.tensor([1]), top_k=3, top_p=0.9) == -1).all()
    both = torch.zeros(2, 1, vocabulary)
    both[1, 0, 0] = math.nan
    assert on_gpu(gpu, both, torch.tensor([1]), cfg=1.5).item() == -1
    assert on_gpu(gpu, torch.full((2, 1, vocabulary), 3e38), torch.tensor([1]), cfg=1.5).item() == -1


def test_values_in_device_memory(gpu: Gpu) -> None:
    """cfg, top_k and top_p of each image in tensors: the tokens of one call an image, and of the CPU kernel."""
    logits, seeds = torch.randn(8, 6, 70) * 2, torch.tensor([3, 1, 4, 1])
    cfg = torch.tensor([0.0, 1.5, 4.0, -0.3], dtype=torch.float64)
    top_k, top_p = torch.tensor([0, 20, 70, 2**40]), torch.tensor([0.96, 0.0, 0.5, 1.0], dtype=torch.float64)
    tokens = on_gpu(gpu, logits, seeds, cfg=cfg, top_k=top_k, top_p=top_p)
    assert torch.equal(tokens, on_cpu(logits, seeds, cfg=cfg, top_k=top_k, top_p=top_p))
    for i in range(4):
        alone: dict[str, Any] = dict(cfg=cfg[i].item(), top_k=int(top_k[i]), top_p=top_p[i].item())
        assert torch.equal(tokens[i], on_cpu(logits[i::4], seeds[i : i + 1], **alone)[0])
    for one in (dict(cfg=cfg[1].float(), top_k=20, top_p=0.9), dict(cfg=1.5, top_k=top_k[1], top_p=top_p[2])):
        numbers: dict[str, Any] = {name: v.item() if isinstance(v, Tensor) else v for name, v in one.items()}
        assert torch.equal(on_gpu(gpu, logits, seeds, **one), on_cpu(logits, seeds, **numbers))


def test_values_out_of_range_in_device_memory(gpu: Gpu) -> None:
    logits, seeds = torch.randn(4, 3, 20), torch.arange(4)
    tokens = on_gpu(
        gpu, logits, seeds, top_k=torch.tensor([-1, 5, 5, 5]), top_p=torch.tensor([0.5, 1.1, math.nan, 1.0])
    )
    assert (tokens[:3] == -1).all()
    assert (tokens[3] >= 0).all()


def test_a_replayed_graph_sees_new_values(gpu: Gpu) -> None:
    if gpu.level != "hardware":
        pytest.skip("only hardware captures graphs")
    logits, seeds = gpu(torch.randn(4, 30, 300)), gpu(torch.tensor([1, 2]))
    values = dict(
        cfg=gpu(torch.tensor([0.5, 1.5], dtype=torch.float64)),
        top_k=gpu(torch.tensor([0, 50])),
        top_p=gpu(torch.tensor([0.9, 0.0], dtype=torch.float64)),
    )
    ops.sample_tokens(logits, seeds, scale_index=3, **values)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = ops.sample_tokens(logits, seeds, scale_index=3, **values)
    for change in range(3):
        seeds += 5
        values["cfg"] += 0.25
        values["top_k"] += 3 * change
        values["top_p"] *= 0.9
        graph.replay()
        expected = on_cpu(logits.cpu(), seeds.cpu(), scale_index=3, **{n: v.cpu() for n, v in values.items()})
        assert torch.equal(tokens.cpu(), expected)


def test_an_image_does_not_depend_on_its_batch(gpu: Gpu) -> None:
    cond, uncond = torch.randn(2, 7, 5, 33)
    seeds = torch.tensor([5, 3, 99, 0, 7, 7, -4])

    def draw(chosen: list[int]) -> Tensor:
        logits = torch.cat([cond[chosen], uncond[chosen]])
        return on_gpu(gpu, logits, seeds[chosen], scale_index=4, cfg=1.5, top_k=20, top_p=0.96)

    together = draw(list(range(7)))
    order = [4, 6, 0, 2, 1, 5, 3]
    assert torch.equal(draw(order), together[order])
    assert all(torch.equal(draw([i])[0], together[i]) for i in range(7))


def test_the_order_of_threads_changes_no_token(gpu: Gpu) -> None:
    logits, seeds = torch.randn(2, 5, 3000), torch.arange(2)
    for seed in range(3):
        if gpu.level == "emulated":
            emulation.emulator().seed(seed)
        assert_same(gpu, logits, seeds, top_k=900, top_p=0.96)


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_no_bank_conflicts(traced: Gpu, dtype: torch.dtype) -> None:
    logits = torch.randn(2, 1, 5000).to(dtype)
    on_gpu(traced, logits, torch.arange(1), cfg=1.5, top_k=900, top_p=0.96)
    assert traced.conflicts() == []


def test_fakes_on_cuda() -> None:
    """Shapes, dtypes and devices without a GPU, also with values in tensors."""
    with FakeTensorMode():
        logits = torch.empty(4, 5, 33, device="cuda", dtype=torch.bfloat16)
        seeds = torch.empty(2, device="cuda", dtype=torch.int64)
        for cfg in (1.5, torch.empty(2, device="cuda"), torch.empty((), device="cuda")):
            tokens = ops.sample_tokens(logits, seeds, scale_index=0, cfg=cfg, top_k=9)
            assert (tokens.device.type, tokens.dtype, tokens.shape) == ("cuda", torch.int64, (2, 5))


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0)])
def test_nothing_in_nothing_out(gpu: Gpu, batch: int, length: int) -> None:
    tokens = on_gpu(
        gpu, torch.zeros(batch, length, 5), torch.zeros(batch, dtype=torch.int64), top_k=2, top_p=0.9
    )
    assert tokens.shape == (batch, length)


def test_the_kernel_refuses(gpu: Gpu) -> None:
    seeds, out = gpu(torch.zeros(2**16, dtype=torch.int64)), gpu(torch.zeros(1, dtype=torch.int64))
    logits = gpu(torch.zeros(1))
    many = _C.TensorView(logits.data_ptr(), (2**16, 2**15, 1), (0, 0, 1), _C.DType.float32)
    target = _C.TensorView(out.data_ptr(), (2**16, 2**15), (2**15, 1), _C.DType.int64)
    with pytest.raises(
        ValueError, match=r"sample_tokens: B \* L must be below 2\^31 on CUDA, got 2147483648"
    ):
        kernels(logits).sample_tokens(many, view(seeds), target, 0, None, 0, 0.0)


def test_random_rows(gpu: Gpu) -> None:
    """Of a thousand rows each: published settings and others, dtypes in turn, guidance every second time."""
    for i in range(-(-ROWS // 1000)):
        vocabulary = (40, 97, 13, 300)[i % 4]
        dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        cfg = (None, 1.5, None, 4.0, None, 0.3)[i % 6]
        logits = (torch.randn(20 if cfg is None else 40, 50, vocabulary) * (0.5 + i % 5)).to(dtype)
        seeds = torch.randint(-(2**63), 2**63 - 1, (20,))
        top_k, top_p = ((0, 0.0), (vocabulary // 5, 0.96), (0, 0.96), (vocabulary // 2, 0.0), (9, 0.5))[i % 5]
        assert_same(gpu, logits, seeds, scale_index=i, cfg=cfg, top_k=top_k, top_p=top_p)
