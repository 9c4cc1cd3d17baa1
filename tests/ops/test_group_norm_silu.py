from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ops import oracle
from var_ext import ops

SHAPES = [
    (1, 4, 1, 1, 2),
    (2, 32, 7, 5, 32),
    (1, 96, 9, 16, 32),
    (3, 6, 1, 151, 3),
    (0, 8, 4, 4, 2),
]  # B, C, H, W, groups
FORMATS = (torch.contiguous_format, torch.channels_last)


def exact(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-6) -> Tensor:
    x, weight, bias = x.double(), weight.double(), bias.double()
    grouped = x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])  # (B, G, C / G, H, W)
    centred = grouped - grouped.mean(dim=(2, 3, 4), keepdim=True)
    normed = centred / (centred.square().mean(dim=(2, 3, 4), keepdim=True) + eps).sqrt()
    y = normed.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    return y / (1 + (-y).exp())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_against_float64(
    either_backend: str, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    *size, groups = shape
    x = torch.randn(size).to(dtype).to(memory_format=memory_format)
    weight, bias = torch.randn(2, size[1]).to(dtype)
    result = ops.group_norm_silu(x, weight, bias, groups=groups)
    assert not x.numel() or result.is_contiguous(memory_format=memory_format)
    torchs = F.silu(F.group_norm(x, groups, weight, bias, 1e-6))
    oracle.assert_as_good_as_torch(result, torchs, exact(x, weight, bias, groups))


def test_strided_view(either_backend: str) -> None:
    x = torch.randn(2, 12, 9, 10)[:, ::2, 1:, ::3]  # (2, 6, 8, 4)
    weight, bias = torch.randn(2, 12)[:, ::2]
    oracle.assert_equal_up_to_rounding(
        ops.group_norm_silu(x, weight, bias, groups=3), exact(x, weight, bias, groups=3)
    )


def test_an_offset_does_not_eat_the_variance(either_backend: str) -> None:
    # E[x^2] - E[x]^2 in fp32 would lose everything here: the square of the mean is 1e6 times the variance
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64) + 1000
    weight, bias = torch.ones(4), torch.zeros(4)
    result = ops.group_norm_silu(x.float(), weight, bias, groups=2)
    # the input itself is rounded to 3e-5 of its spread
    torch.testing.assert_close(result.double(), exact(x.float(), weight, bias, 2), rtol=1e-3, atol=1e-3)


def test_eps(either_backend: str) -> None:
    x, weight, bias = torch.randn(1, 4, 3, 3) * 1e-3, torch.randn(4), torch.randn(4)
    result = ops.group_norm_silu(x, weight, bias, groups=2, eps=0.1)
    oracle.assert_equal_up_to_rounding(result, exact(x, weight, bias, 2, eps=0.1))


def test_gradients(either_backend: str) -> None:
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *given: ops.group_norm_silu(*given, groups=2), (x, weight, bias))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_registration(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 4, 3, 3).to(memory_format=memory_format).requires_grad_()
    weight, bias = (torch.randn(4, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.var_ext.group_norm_silu, (x, weight, bias, 2, 1e-6))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(4, 3, 3)), ValueError, r"x must have shape \(B, C, H, W\).*got \(4, 3, 3\)"),
        (dict(weight=torch.zeros(5)), ValueError, r"weight must have shape \(C,\) = \(4\), got \(5,\)"),
        (dict(bias=torch.zeros(4, 1)), ValueError, r"bias must have shape.*got \(4, 1\)"),
        (dict(groups=3), ValueError, "groups must divide C = 4, got 3"),
        (dict(groups=0), ValueError, "groups must divide C = 4, got 0"),
        (dict(x=torch.zeros(1, 4, 3, 3).int()), TypeError, "x must be float32.*got int32"),
        (dict(weight=torch.zeros(4).half()), TypeError, "one dtype, got.*weight float16"),
        (dict(bias=torch.zeros(4, device="meta")), ValueError, "one device, got.*bias on meta"),
    ],
)
def test_bad_input(
    either_backend: str, change: dict[str, object], error: type[Exception], message: str
) -> None:
    given = dict(x=torch.zeros(1, 4, 3, 3), weight=torch.ones(4), bias=torch.zeros(4), groups=2)
    with pytest.raises(error, match=f"group_norm_silu: .*{message}"):
        ops.group_norm_silu(**{**given, **change})  # type: ignore[arg-type]
