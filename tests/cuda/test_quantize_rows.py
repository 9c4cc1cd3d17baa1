from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.ops import oracle
from tests.ops.test_quantize_rows import SHAPES, assert_same, exact, random_bits
from var_ext import _C, ops, reference
from var_ext.ops._native import kernels, view

# Rows of 16 bytes around a warp's four steps and a block's, the longest of a block, and one beyond
ODD = [(2, 8), (3, 24), (2, 2, 136), (3, 1032), (5, 520), (2, 4104), (1, 10240), (1, 20480), (1, 10248)]


def on_gpu(gpu: Gpu, x: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = ops.quantize_rows(gpu(x))
    return q.cpu(), scale.cpu()


def on_cpu(x: Tensor) -> tuple[Tensor, Tensor]:
    """The CPU's kernel, whatever the ops run on."""
    x = x.contiguous()
    q, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(*x.shape[:-1], 1)
    rows = x.reshape(-1, x.shape[-1])
    _C.quantize_rows(view(rows), view(q.view(rows.shape)), view(scale.view(-1)))
    return q, scale


@pytest.mark.parametrize("shape", [*SHAPES, *ODD], ids=str)
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_the_bits_of_the_cpu(gpu: Gpu, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 3).to(dtype)
    result = on_gpu(gpu, x)
    assert_same(result, exact(x))
    assert_same(result, on_cpu(x))


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("channels", [3, 24])
def test_all_magnitudes(gpu: Gpu, channels: int, dtype: torch.dtype) -> None:
    x = random_bits(400, channels, dtype)
    x[7], x[8] = 0, -0.0
    x[9] = torch.finfo(dtype).smallest_normal / 8
    result = on_gpu(gpu, x)
    assert_same(result, exact(x))
    assert_same(result, on_cpu(x))


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("off", ["nothing", "x", "q", "scale"])
def test_any_place(gpu: Gpu, off: str, dtype: torch.dtype) -> None:
    """The kernels themselves: rows apart, and each tensor in turn off the alignment; no byte beside their own."""
    x = torch.randn(5, 40).to(dtype)
    for pad in (0, 8, 3):
        apart = gpu(F.pad(oracle.unaligned(x) if off == "x" and not pad else x, (0, pad)))
        apart = apart[:, 1:34] if off == "x" and pad else apart[:, :40]
        channels = apart.shape[1]
        memory, scales = gpu(torch.full((5 * 40 + 32,), 7).byte()), gpu(torch.full((9,), 7.0))
        begin, first = (1 if off == "q" else 16), (1 if off == "scale" else 0)
        q, scale = memory[begin : begin + 5 * channels].view(5, channels), scales[first : first + 5]
        kernels(apart).quantize_rows(view(apart), view(q), view(scale))
        assert_same((q.cpu(), scale[:, None].cpu()), exact(apart.cpu()))
        assert memory[:begin].eq(7).all() and memory[begin + 5 * channels :].eq(7).all()
        assert scales[:first].eq(7).all() and scales[first + 5 :].eq(7).all()


def test_strides(gpu: Gpu) -> None:
    wide = torch.randn(6, 5, 80).bfloat16()
    for x in (
        wide[::2, 1:3, :65],
        wide.transpose(0, 2)[:65].transpose(0, 2),
        wide[..., ::2],
        wide[..., 8:9],
        wide[:, :1].expand(6, 5, 80),
    ):
        assert_same(on_gpu(gpu, x), exact(x))


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("channels", [69, 264])
def test_special_values(gpu: Gpu, channels: int, dtype: torch.dtype) -> None:
    """NaN and infinity are told by the scale, of their row alone."""
    for special in (math.nan, -math.nan, math.inf, -math.inf):
        for place in (0, channels - 1):
            x = torch.randn(3, channels).to(dtype)
            x[1, place], x[1, 33] = special, math.inf
            result = on_gpu(gpu, x)
            assert result[1][1].isnan() and result[0][1].eq(128).all()
            assert_same(result, reference.quantize_rows(x))
            assert_same(result, on_cpu(x))


@pytest.mark.parametrize("channels", [1, 8])
def test_many_rows(gpu: Gpu, channels: int) -> None:
    x = torch.randn(70000, channels).bfloat16()
    with gpu.sampled(200):
        q, scale = on_gpu(gpu, x)
    right_q, right_scale = exact(x)
    ran = slice(None) if gpu.level != "emulated" else [0, -1]  # the first and the last are among the sampled
    assert torch.equal(q[ran], right_q[ran])
    assert torch.equal(scale[ran], right_scale[ran])


def test_offsets_beyond_32_bits(gpu: Gpu) -> None:
    if gpu.level != "emulated":
        pytest.skip("spans 4 GB, of which the emulator touches a few pages")
    for channels in (8, 5):
        far = 2**31
        place = torch.empty(far + channels, dtype=torch.bfloat16)
        x = torch.randn(2, channels).bfloat16()
        apart = place.as_strided((2, channels), (far, 1)).copy_(x)
        assert_same(on_gpu(gpu, apart), exact(x))


@pytest.mark.parametrize("channels", [150, 1024])
def test_the_order_of_threads_changes_no_bit(gpu: Gpu, channels: int) -> None:
    x = torch.randn(7, channels)
    for seed in range(3):
        if gpu.level == "emulated":
            emulation.emulator().seed(seed)
        assert_same(on_gpu(gpu, x), exact(x))


@pytest.mark.parametrize("channels", [50, 1032])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_no_bank_conflicts(traced: Gpu, channels: int, dtype: torch.dtype) -> None:
    on_gpu(traced, torch.randn(5, channels).to(dtype))
    assert traced.conflicts() == []


def test_the_kernel_refuses(gpu: Gpu) -> None:
    x, q, scale = gpu(torch.zeros(1, 1)), gpu(torch.zeros(1, 1).byte()), gpu(torch.zeros(1))
    many = 2**31
    far_x = _C.TensorView(x.data_ptr(), (many, 1), (0, 1), _C.DType.float32)
    far_q = _C.TensorView(q.data_ptr(), (many, 1), (1, 1), _C.DType.uint8)
    far_scale = _C.TensorView(scale.data_ptr(), (many,), (1,), _C.DType.float32)
    with pytest.raises(ValueError, match=r"quantize_rows: R must be below 2\^31 on CUDA, got 2147483648"):
        kernels(x).quantize_rows(far_x, far_q, far_scale)
