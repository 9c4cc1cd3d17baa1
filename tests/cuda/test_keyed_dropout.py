from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.ops import oracle
from tests.ops.test_keyed_dropout import FORMATS, KEPT, SHAPES, check, is_kept, keys_of, layouts
from var_ext import _C, ops, reference, splitmix64
from var_ext.ops._native import kernels, view

# Of 16 bytes and not, pixels and channels by fours and not, more than a block and its last one
ODD = [(3, 1024), (2, 1029), (3, 4, 8, 8), (2, 8, 4, 6), (2, 12, 16, 32), (1, 6, 8, 8), (2, 16, 3, 5)]


@pytest.mark.parametrize("shape", [*SHAPES, *ODD], ids=str)
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_each_element(gpu: Gpu, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    keys, counter = keys_of(shape[0])
    for x in layouts(torch.randn(shape).to(dtype)):
        check(ops.keyed_dropout(gpu(x), gpu(keys), gpu(counter), KEPT), x, keys, counter)


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_any_place(gpu: Gpu, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """The kernel itself, x and the output in turn off the alignment."""
    keys, counter = keys_of(2)
    near = torch.randn(2, 4, 8, 4).to(dtype).contiguous(memory_format=memory_format)

    def off(t: Tensor) -> Tensor:
        return torch.empty(t.numel() + 1, dtype=dtype)[1:].as_strided(t.shape, t.stride()).copy_(t)

    for x, out in ((off(near), near.clone()), (near, off(near))):
        x, out = gpu(x), gpu(out)
        kernels(x).keyed_dropout(view(x), view(gpu(keys)), view(gpu(counter)), view(out), KEPT)
        check(out, near, keys, counter)


def test_the_gradient_in_another_memory_format(gpu: Gpu) -> None:
    keys, counter = keys_of(2)
    x, grad = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)
    leaf = gpu(x).requires_grad_()
    y = ops.keyed_dropout(leaf, gpu(keys), gpu(counter), KEPT)
    for given in layouts(grad):
        (found,) = torch.autograd.grad(y, leaf, gpu(given), retain_graph=True)
        check(found, given, keys, counter)


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_special_values(gpu: Gpu, dtype: torch.dtype) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0, 2.0]).to(dtype).repeat(2, 9)
    keys, counter = keys_of(2)
    check(ops.keyed_dropout(gpu(x), gpu(keys), gpu(counter), KEPT), x, keys, counter)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_many_blocks(gpu: Gpu, memory_format: torch.memory_format) -> None:
    """However threads are dealt out."""
    keys, counter = keys_of(2)
    x = torch.randn(2, 20, 36, 32).contiguous(memory_format=memory_format)
    wanted = reference.keyed_dropout(x, keys, counter, KEPT)
    for seed in range(2):
        if gpu.level == "emulated":
            emulation.emulator().seed(seed)
        assert torch.equal(ops.keyed_dropout(gpu(x), gpu(keys), gpu(counter), KEPT).cpu(), wanted)


@pytest.mark.parametrize(
    "shape", [(2**25, 4, 8, 2), (1, 2**32 + 4, 4, 2), (2**24 - 1, 6, 7, 3), (1, 4, 2**29 + 4)], ids=str
)
def test_offsets_beyond_32_bits(gpu: Gpu, tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Of contiguous maps, four channels at a time, whose number goes as far, or element by element, and of one row."""
    if gpu.level != "emulated":
        pytest.skip("spans up to 64 GB, in a sparse file, of which the emulator touches a few pages")
    x = torch.from_file(str(tmp_path / "x"), shared=True, size=prod(shape), dtype=torch.bfloat16).view(shape)
    keys, counter = torch.zeros(shape[0], dtype=torch.int64), splitmix64.counter(5)
    x.view(-1)[-8:] = torch.arange(1, 9)
    with gpu.sampled(2):  # in place: a thread reads its own elements before it writes them
        kernels(x).keyed_dropout(view(x), view(keys), view(counter), view(x), KEPT)
    found = x.view(-1)[-8:]
    if len(shape) == 4:  # the last pixels of a channel
        *_, channels, height, width = shape
        numbers = range(channels * (height * width - 7) - 1, channels * height * width, channels)
    else:
        numbers = range(x.numel() - 8, x.numel())
    keeps = torch.tensor([is_kept(0, counter, i, KEPT) for i in numbers])
    assert torch.equal(found, torch.arange(1, 9).bfloat16() * keeps * (2**16 / KEPT))


def test_the_kernel_refuses(gpu: Gpu) -> None:
    x, keys, counter = gpu(torch.zeros(1)), gpu(torch.zeros(1).long()), gpu(splitmix64.counter(0))
    wide = _C.TensorView(x.data_ptr(), (1, 2**31), (2**31, 1), _C.DType.float32)
    off = _C.TensorView(x.data_ptr() + 4, (1, 2**31), (2**31, 1), _C.DType.float32)
    with pytest.raises(
        ValueError, match=r"keyed_dropout: elements that do not lie at 16 bytes must be below 2\^31 on CUDA"
    ):
        kernels(x).keyed_dropout(wide, view(keys), view(counter), off, KEPT)
