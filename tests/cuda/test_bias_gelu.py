from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.ops import oracle
from tests.ops.test_bias_gelu import SHAPES, exact, exact_gradients, torch_gradients
from var_ext import _C, ops
from var_ext.engine.layers import Dense
from var_ext.ops._native import kernels, maybe_view, view

# Rows around those of a chunk, a warp and a step; columns around those of a warp; of 16 bytes, and not
ODD = [(1, 8), (9, 24), (33, 40), (31, 264), (3, 300), (70, 16), (200, 5), (2, 3, 1024)]
CASES = [*SHAPES, *ODD]


def given(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(shape).to(dtype) * 3, torch.randn(shape[-1]).to(dtype), torch.randn(shape).to(dtype)


def both(gpu: Gpu, x: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and both gradients, through the op."""
    x, bias = (gpu(t).detach().requires_grad_() for t in (x, bias))
    y = ops.bias_gelu(x, bias)
    assert y.is_contiguous()
    return [t.cpu() for t in (y.detach(), *torch.autograd.grad(y, (x, bias), gpu(grad)))]


def compare(results: list[Tensor], x: Tensor, bias: Tensor, grad: Tensor) -> None:
    torchs = (F.gelu(x + bias, approximate="tanh"), *torch_gradients(x, bias, grad))
    truths = (exact(x, bias), *exact_gradients(x, bias, grad))
    for mine, torchs_own, truth in zip(results, torchs, truths, strict=True):
        oracle.assert_as_good_as_torch(mine, torchs_own, truth)


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_against_float64(gpu: Gpu, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = given(shape, dtype)
    compare(both(gpu, *tensors), *tensors)


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("off", range(-1, 5))
def test_any_place(gpu: Gpu, off: int, dtype: torch.dtype) -> None:
    """The kernels themselves: rows apart, and each tensor in turn off the alignment."""
    x, bias, grad = given((37, 40), dtype)
    outputs = [torch.empty_like(x), torch.empty_like(x), torch.empty_like(bias)]
    tensors = [x, bias, grad, outputs[0], outputs[1]]
    x, bias, grad, y, grad_x = (gpu(oracle.unaligned(t) if i == off else t) for i, t in enumerate(tensors))
    grad_bias, sums = gpu(outputs[2]), gpu(torch.empty(3, 40))
    for pad in (0, 8, 3):
        apart = F.pad(x, (0, pad))[:, :40] if pad else x
        kernels(x).bias_gelu(view(apart), view(bias), view(y))
        kernels(x).bias_gelu_backward(
            view(grad), view(apart), view(bias), view(grad_x), view(grad_bias), view(sums)
        )
        compare([t.cpu() for t in (y, grad_x, grad_bias)], *tensors[:3])


def test_strides_that_need_a_copy(gpu: Gpu) -> None:
    wide, bias = torch.randn(6, 5, 80), torch.randn(80)
    for x in (
        wide[::2, 1:3, :65],
        wide.transpose(0, 2)[:65].transpose(0, 2),
        wide[..., ::2],
        wide[:, :1].expand(6, 5, 80),
    ):
        part = bias[::2] if x.shape[-1] == 40 else bias[: x.shape[-1]]
        grad = torch.randn(x.shape[::-1]).permute(2, 1, 0)
        compare(both(gpu, x, part, grad), x, part, grad)


@pytest.mark.parametrize("shape", [(70000, 1), (1, 70000), (70000, 8)], ids=str)
def test_large_counts(gpu: Gpu, shape: tuple[int, ...]) -> None:
    x, bias, grad = given(shape)
    results = both(gpu, x, bias, grad)
    truths = [exact(x, bias), *exact_gradients(x, bias, grad)]
    for mine, truth in zip(results, truths, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=2e-6 * math.sqrt(shape[0]))


def test_offsets_beyond_32_bits(gpu: Gpu) -> None:
    if gpu.level != "emulated":
        pytest.skip("spans 16 GB, of which the emulator touches a few pages")
    for channels in (8, 5):
        far = 2**31
        place = torch.empty(far + channels, dtype=torch.bfloat16)
        x, bias, grad = given((2, channels), torch.bfloat16)
        apart = place.as_strided((2, channels), (far, 1)).copy_(x)
        compare(both(gpu, apart, bias, grad), x, bias, grad)


def test_the_whole_range_of_float32(gpu: Gpu) -> None:
    x = torch.cat([torch.linspace(-40, 40, 2049), torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1e30, -1e30])])
    y, slope, _ = both(gpu, x, torch.zeros(len(x)), torch.ones(len(x)))
    oracle.assert_equal_up_to_rounding(y, exact(x, torch.zeros(1)))
    right = exact_gradients(x[:-2], torch.zeros(1), torch.ones(len(x) - 2))[0]  # 0 and 1 at the two ends
    oracle.assert_equal_up_to_rounding(slope, torch.cat([right, torch.tensor([1.0, 0.0])]))


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_special_values(gpu: Gpu, dtype: torch.dtype) -> None:
    """NaN passes and stays in its row; infinity is where torch has it."""
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0] * 8).to(dtype).expand(2, 40).contiguous()
    x[1] = 1
    y, grad_x, grad_bias = both(gpu, x, torch.zeros(40, dtype=dtype), torch.ones_like(x))
    torchs = F.gelu(x, approximate="tanh")
    assert torch.equal(y.isnan(), torchs.isnan())
    assert torch.equal(y.isinf(), torchs.isinf())
    assert torch.equal(grad_x.isnan(), x.isnan())
    assert torch.equal(grad_bias.isnan(), x[0].isnan())


@pytest.mark.parametrize("channels", [50, 512])
def test_the_order_of_threads_changes_no_bit(gpu: Gpu, channels: int) -> None:
    tensors = given((150, channels))
    runs = []
    for seed in range(3):
        if gpu.level == "emulated":
            emulation.emulator().seed(seed)
        runs.append(both(gpu, *tensors))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("channels", [50, 264])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_no_bank_conflicts(traced: Gpu, channels: int, dtype: torch.dtype) -> None:
    both(traced, *given((20, channels), dtype))
    assert traced.conflicts() == []


def test_the_kernel_refuses(gpu: Gpu) -> None:
    x, bias = gpu(torch.zeros(2, 8)), gpu(torch.zeros(8))

    def backward_with(sums: Tensor | None) -> None:
        kernels(x).bias_gelu_backward(
            view(x), view(x), view(bias), view(torch.empty_like(x)), view(torch.empty_like(bias)), maybe_view(sums)
        )  # fmt: skip

    with pytest.raises(
        ValueError, match=r"^bias_gelu_backward: scratch must have shape \(P, C\) on CUDA, got none"
    ):
        backward_with(None)
    with pytest.raises(ValueError, match=r"scratch must have shape \(P, 8\), got \(1, 7\)"):
        backward_with(gpu(torch.zeros(1, 7)))
    many = 2**37
    x_many = _C.TensorView(x.data_ptr(), (many, 1), (0, 1), _C.DType.float32)
    out_many = _C.TensorView(x.data_ptr(), (many, 1), (1, 1), _C.DType.float32)
    with pytest.raises(ValueError, match=r"bias_gelu: blocks of 32 rows must be below 2\^31 on CUDA, got"):
        kernels(x).bias_gelu(x_many, view(bias[:1]), out_many)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_epilogue_that_an_engine_takes_is_the_tanh_form(gpu: Gpu, dtype: torch.dtype) -> None:
    """In float32 nothing hides that the erf form is up to 5e-4 off; in 16 bits the engine's layer is near it."""
    if gpu.level != "hardware":
        pytest.skip("a kernel of torch's")
    x, weight, bias = gpu(torch.randn(70, 64)), gpu(torch.randn(128, 64) / 8), gpu(torch.randn(128))
    exact = F.gelu((x.double() @ weight.double().t()) + bias.double(), approximate="tanh")
    wide = torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    assert (wide - exact).abs().max() < 1e-4
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    y = Dense(weight, bias, dtype).gelu(x)
    exact = F.gelu((x.double() @ weight.double().t()) + bias.double(), approximate="tanh")
    assert (y - exact).abs().max() < 2 * torch.finfo(dtype).eps * exact.abs().max()
