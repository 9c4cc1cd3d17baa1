from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.ops import oracle
from tests.ops.test_bias_residual import FORMATS, SHAPES, check, example, in_places, layouts
from var_ext import _C, ops
from var_ext.ops._native import kernels, view

# Pixels and maps within and across 16 bytes, elements around those of a block's 1024 threads and steps
ODD = [
    (1, 160, 9, 16),
    (2, 320, 3, 5),
    (2, 8, 1, 8),
    (3, 24, 5, 8),
    (1, 1, 32, 32),
    (1, 41, 5, 5),
    (1, 2056, 1, 8),
]


@pytest.mark.parametrize("shape", [*SHAPES, *ODD], ids=str)
@pytest.mark.parametrize("dtype", oracle.LOW)
@layouts
@in_places
def test_against_float64(
    gpu: Gpu,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    in_place: bool,
) -> None:
    h, x, bias = example(shape, dtype, memory_format)
    place = gpu(h.clone())
    result = ops.bias_residual(place, gpu(x), gpu(bias), in_place=in_place)
    check(result.cpu(), h, x, bias)
    assert not h.numel() or result.is_contiguous(memory_format=memory_format)
    assert torch.equal(place.cpu(), result.cpu() if in_place else h)


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("off", range(-1, 4))
@layouts
def test_any_place(gpu: Gpu, off: int, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """The kernel itself, with each tensor in turn off the alignment."""
    h, x, bias = example((2, 24, 5, 8), dtype, memory_format)

    def unaligned(t: Tensor) -> Tensor:
        place = torch.empty(t.numel() + 1, dtype=dtype)[1:]
        return place.as_strided(t.shape, t.stride()).copy_(t)

    given = (h, x, bias, torch.empty_like(h))
    places = [gpu(unaligned(t) if i == off else t) for i, t in enumerate(given)]
    kernels(places[0]).bias_residual(*map(view, places))
    check(places[3].cpu(), h, x, bias)


@layouts
@in_places
def test_strides_that_need_a_copy(gpu: Gpu, memory_format: torch.memory_format, in_place: bool) -> None:
    h, x, _ = example((2, 8, 9, 5), torch.float32, memory_format)
    bias, wide = torch.randn(8, 2)[:, 1], torch.randn(2, 16, 9, 10)
    other = FORMATS[1 - FORMATS.index(memory_format)]
    for branch, stream in (
        (h, x.to(memory_format=other)),
        (h, torch.randn(2, 8, 1, 1).expand(h.shape)),
        (wide[:, ::2, :, ::2], x),
    ):
        before = branch.clone()
        result = ops.bias_residual(gpu(branch), gpu(stream), gpu(bias), in_place=in_place)
        check(result.cpu(), before, stream, bias)


@layouts
def test_offsets_beyond_32_bits(gpu: Gpu, memory_format: torch.memory_format) -> None:
    if gpu.level != "emulated":
        pytest.skip("spans 8 GB, of which the emulator touches a few pages")
    near, x, bias = example((1, 8, 8, 8), torch.bfloat16, memory_format)
    shape = (2**31 // near.numel() + 1, 8, 8, 8)
    h = torch.empty(shape, dtype=torch.bfloat16, memory_format=memory_format)
    h[-1] = near[0]
    stream = torch.empty(shape, dtype=torch.bfloat16, memory_format=memory_format)
    stream[-1] = x[0]
    with gpu.sampled(2):
        y = ops.bias_residual(h, stream, bias)
    assert torch.equal(y[-1, -1], ops.bias_residual(near, x, bias)[0, -1])


@layouts
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_the_bits_of_the_cpu(gpu: Gpu, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Two sums in the same order and one rounding, however threads are dealt out."""
    h, x, bias = example((2, 40, 15, 14), dtype, memory_format)
    expected = torch.empty_like(h)
    _C.bias_residual(view(h), view(x), view(bias), view(expected))
    for seed in range(2):
        if gpu.level == "emulated":
            emulation.emulator().seed(seed)
        assert torch.equal(ops.bias_residual(gpu(h), gpu(x), gpu(bias)).cpu(), expected)


def test_the_kernel_refuses(gpu: Gpu) -> None:
    h, bias = gpu(torch.zeros(1, 1, 1, 1)), gpu(torch.zeros(1))
    flat = (2**31, 2**31, 2**16, 1)
    wide = _C.TensorView(h.data_ptr(), (1, 1, 2**15, 2**16), flat, _C.DType.float32)
    off = _C.TensorView(h.data_ptr() + 4, (1, 1, 2**15, 2**16), flat, _C.DType.float32)
    with pytest.raises(
        ValueError, match=r"bias_residual: elements that do not lie at 16 bytes must be below 2\^31 on CUDA"
    ):
        kernels(h).bias_residual(wide, off, view(bias), wide)
