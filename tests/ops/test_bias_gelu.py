from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ops import oracle
from tests.threads import threads
from var_ext import _C, ops
from var_ext.ops._native import view

SHAPES = [(1,), (7, 33), (2, 151, 64), (3, 1, 129), (0, 16), (4, 0), (2, 3, 4, 5)]


def exact(x: Tensor, bias: Tensor) -> Tensor:
    u = x.double() + bias.double()
    return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


def exact_gradients(x: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x, bias = (t.detach().double().requires_grad_() for t in (x, bias))
    return torch.autograd.grad(exact(x, bias), (x, bias), grad.double())


def gradients(x: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x, bias = (t.detach().requires_grad_() for t in (x, bias))
    return torch.autograd.grad(ops.bias_gelu(x, bias), (x, bias), grad)


def torch_gradients(x: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x, bias = (t.detach().requires_grad_() for t in (x, bias))
    return torch.autograd.grad(F.gelu(x + bias, approximate="tanh"), (x, bias), grad)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_against_float64(either_backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, bias = torch.randn(shape).to(dtype) * 3, torch.randn(shape[-1]).to(dtype)
    result = ops.bias_gelu(x, bias)
    assert result.is_contiguous()
    oracle.assert_as_good_as_torch(result, F.gelu(x + bias, approximate="tanh"), exact(x, bias))


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_each_variant(each_isa: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x, bias, grad = (torch.randn(size).to(dtype) for size in (shape, shape[-1:], shape))
        oracle.assert_as_good_as_torch(
            ops.bias_gelu(x, bias), F.gelu(x + bias, approximate="tanh"), exact(x, bias)
        )
        wanted = exact_gradients(x, bias, grad)
        torchs = torch_gradients(x, bias, grad)
        for result, torch_result, right in zip(gradients(x, bias, grad), torchs, wanted, strict=True):
            oracle.assert_as_good_as_torch(result, torch_result, right)


def test_the_whole_range_of_float32(each_isa: str) -> None:
    x = torch.cat([torch.linspace(-40, 40, 4097), torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1e30, -1e30])])
    oracle.assert_equal_up_to_rounding(ops.bias_gelu(x, torch.zeros(len(x))), exact(x, torch.zeros(1)))
    slope, _ = gradients(x, torch.zeros(len(x)), torch.ones(len(x)))
    right = exact_gradients(x[:-2], torch.zeros(1), torch.ones(len(x) - 2))[0]  # 0 and 1 at the two ends
    oracle.assert_equal_up_to_rounding(slope, torch.cat([right, torch.tensor([1.0, 0.0])]))


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_special_values(each_isa: str, dtype: torch.dtype) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0] * 9).to(dtype)
    result, torchs = ops.bias_gelu(x, torch.zeros_like(x)), F.gelu(x, approximate="tanh")
    assert torch.equal(result.isnan(), torchs.isnan())
    assert torch.equal(result.isinf(), torchs.isinf())


def test_any_strides(each_isa: str) -> None:
    wide = torch.randn(6, 5, 80)
    bias = torch.randn(80)
    for x in (
        wide[..., 3:68],  # rows at equal distances, one element off
        wide[::2, 1:3, :65],  # rows at two distances
        wide.transpose(0, 1)[..., :65],
        wide.transpose(0, 2)[:65].transpose(0, 2),
        wide[..., ::2],
        wide[:, :1].expand(6, 5, 80),
    ):
        part = bias[::2] if x.shape[-1] == 40 else bias[: x.shape[-1]]
        grad = torch.randn(x.shape[::-1]).permute(2, 1, 0)
        result = ops.bias_gelu(x, part)
        assert result.is_contiguous()
        oracle.assert_equal_up_to_rounding(result, exact(x, part))
        for got, wanted in zip(gradients(x, part, grad), exact_gradients(x, part, grad), strict=True):
            oracle.assert_equal_up_to_rounding(got, wanted)


def test_thread_count_changes_nothing() -> None:
    x, bias, grad = torch.randn(700, 257), torch.randn(257), torch.randn(700, 257)
    runs = []
    for count in (1, 2, 3):
        with threads(count):
            runs.append((ops.bias_gelu(x, bias), *gradients(x, bias, grad)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_gradients(either_backend: str) -> None:
    x, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (5,)))
    assert torch.autograd.gradcheck(ops.bias_gelu, (x, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_registration(dtype: torch.dtype) -> None:
    x, bias = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((2, 3, 5), (5,)))
    torch.library.opcheck(torch.ops.var_ext.bias_gelu, (x, bias))
    torch.library.opcheck(torch.ops.var_ext.bias_gelu, (x.transpose(0, 1), bias))
    torch.library.opcheck(torch.ops.var_ext.bias_gelu_backward, (x.detach(), x.detach(), bias.detach()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(2, 5)), ValueError, r"x must have shape \(..., C\) = \(..., 4\), got \(2, 5\)"),
        (dict(x=torch.zeros(())), ValueError, r"x must have shape.*got \(\)"),
        (dict(bias=torch.zeros(1, 4)), ValueError, r"bias must have shape.*got \(1, 4\)"),
        (dict(x=torch.zeros(2, 4).int()), TypeError, "x must be float32.*got int32"),
        (dict(bias=torch.zeros(4).half()), TypeError, "one dtype, got.*bias float16"),
        (dict(bias=torch.zeros(4, device="meta")), ValueError, "one device, got.*bias on meta"),
        (dict(x=[1.0]), TypeError, "x must be a tensor.*got list"),
    ],
)
def test_bad_input(
    either_backend: str, change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"bias_gelu: .*{message}"):
        ops.bias_gelu(**{**dict(x=torch.zeros(2, 4), bias=torch.zeros(4)), **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 4).double()), "x must be one of float32, .*, got float64"),
        (dict(x=torch.zeros(())), r"x must have shape \(..., C\), got \(\)"),
        (dict(x=torch.zeros(2, 8)[:, ::2]), r"x must have dense channels .*got shape \(2, 4\)"),
        (dict(bias=torch.zeros(5)), r"bias must have shape \(4,\), got \(5,\)"),
        (dict(bias=torch.zeros(8)[::2]), "bias must have dense channels"),
        (dict(out=torch.zeros(3, 4)), r"out must have the shape of x, \(2, 4\), got \(3, 4\)"),
        (dict(out=torch.zeros(2, 4).half()), "out must be float32, got float16"),
        (dict(out=torch.zeros(2, 5)[:, :4]), r"out must be contiguous, got shape \(2, 4\)"),
    ],
)
def test_kernel_refuses(change: dict[str, Tensor], message: str) -> None:
    given = {**dict(x=torch.zeros(2, 4), bias=torch.zeros(4), out=torch.zeros(2, 4)), **change}
    with pytest.raises(ValueError, match=f"^bias_gelu: {message}"):
        _C.bias_gelu(*(view(t) for t in given.values()))
    if "out" not in change:
        x, bias, out = given.values()
        with pytest.raises(ValueError, match=f"^bias_gelu_backward: {message}"):
            _C.bias_gelu_backward(view(out), view(x), view(bias), view(out), view(torch.zeros(4)), None)
