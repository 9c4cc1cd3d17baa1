from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ops import oracle
from tests.threads import threads
from var_ext import _C, backend, ops
from var_ext.ops._native import view

# Rows, inputs and outputs: parts of a tile, several of them, and summed axes of two blocks and a bit. A block has 1024
# elements, of one or two numbers.
SIZES = [(1, 1, 1), (13, 33, 31), (24, 64, 64), (5, 1, 70), (201, 17, 65), (3, 1029, 9), (30, 4100, 35)]
DTYPES = [torch.float32, torch.bfloat16]
# x, weight and precision: all of one dtype, autocast, a head in autocast, and wide factors of a narrow x
KINDS = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
]


def given(size: tuple[int, int, int], x: torch.dtype, weight: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight, bias, and the gradient of the output."""
    rows, inputs, outputs = size
    shapes = (rows, inputs), (outputs, inputs), (outputs,), (rows, outputs)
    dtypes = x, weight, weight, x
    return tuple(torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True))


def all_of(linear: Any, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of x, weight and bias."""
    return [linear(x, weight, bias).detach(), *oracle.gradients(linear, (x, weight, bias), (grad,))]


def exact(precision: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """In float64, from rounded factors."""
    wide = bias.double(), grad.double()
    x, weight, rounded = (t.to(precision).double() for t in (x, weight, grad))
    return [x @ weight.t() + wide[0], rounded @ weight, rounded.t() @ x, wide[1].sum(0)]


def check(found: list[Tensor], wanted: list[Tensor], length: int, rounds: bool = False) -> None:
    """Sums in float32 of `length` products of normal numbers, and one rounding to the dtype of the result; if it
    `rounds`, the first of them is one of bfloat16 in any dtype."""
    for n, (result, right) in enumerate(zip(found, wanted, strict=True)):
        assert result.shape == right.shape and result.is_contiguous()
        dtype = torch.bfloat16 if rounds and n == 0 else result.dtype
        assert torch.equal(result, result.to(dtype).to(result.dtype))
        eps = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        torch.testing.assert_close(
            result.double(), right, rtol=eps + 1e-6, atol=2e-6 * math.sqrt(length) + eps * 1e-3
        )


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64(
    each_isa: str, size: tuple[int, int, int], kind: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> None:
    x_dtype, weight_dtype, precision = kind
    tensors = given(size, x_dtype, weight_dtype)
    found = all_of(lambda *t: ops.linear(*t, precision=precision), *tensors)
    assert [t.dtype for t in found] == [x_dtype, x_dtype, weight_dtype, weight_dtype]
    check(found, exact(precision, *tensors), max(size), precision == torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums_as_good_as_torch(each_isa: str, dtype: torch.dtype) -> None:
    x, weight, bias, grad = given((40, 4100, 40), dtype, dtype)
    found, torchs = (all_of(f, x, weight, bias, grad) for f in (ops.linear, F.linear))
    for result, torch_result, right in zip(found, torchs, exact(dtype, x, weight, bias, grad), strict=True):
        oracle.assert_as_good_as_torch(result, torch_result, right)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_reference(kind: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    x_dtype, weight_dtype, precision = kind
    tensors = given((13, 33, 31), x_dtype, weight_dtype)
    with backend.force("reference"):
        result = ops.linear(*tensors[:3], precision=precision)
    check([result], exact(precision, *tensors)[:1], 33, precision == torch.bfloat16)
    found = torch.ops.var_ext.linear_backward.default
    wanted = [True] * 3
    native = found(tensors[3], *tensors[:3], precision == torch.bfloat16, wanted)
    from var_ext.ops.linear import _reference_backward

    plain = _reference_backward(tensors[3], *tensors[:3], precision == torch.bfloat16, wanted)
    for grads in (native, plain):
        check(list(grads), exact(precision, *tensors)[1:], 33)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_bias_and_with_more_axes(either_backend: str, dtype: torch.dtype) -> None:
    x, weight, _, grad = given((24, 20, 36), dtype, dtype)
    x, grad = x.view(2, 3, 4, 20), grad.view(2, 3, 4, 36)
    found = [ops.linear(x, weight).detach(), *oracle.gradients(ops.linear, (x, weight), (grad,))]
    torchs = [F.linear(x, weight), *oracle.gradients(F.linear, (x, weight), (grad,))]
    wanted = exact(torch.float64, x.flatten(0, 2), weight, weight[:, 0] * 0, grad.flatten(0, 2))
    for result, torch_result, right in zip(found, torchs, wanted, strict=False):
        oracle.assert_as_good_as_torch(result, torch_result, right.view(torch_result.shape))


def test_any_strides(each_isa: str) -> None:
    x, weight, bias, grad = given((14, 12, 10), torch.float32, torch.float32)
    parts = x[::2, ::3], weight.t()[:4].t(), bias[:].expand(10), grad.t()[:, ::2].t()
    check(all_of(ops.linear, *parts), exact(torch.float32, *parts), 14)


def test_only_the_gradients_that_are_wanted(either_backend: str) -> None:
    tensors = given((6, 5, 4), torch.float32, torch.float32)
    right = exact(torch.float32, *tensors)
    for n in range(3):
        leaves = [t.clone().requires_grad_(n == i) for i, t in enumerate(tensors[:3])]
        ops.linear(*leaves).backward(tensors[3])
        assert [leaf.grad is not None for leaf in leaves] == [n == i for i in range(3)]
        check([leaves[n].grad], right[n + 1 : n + 2], 6)  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_threads_nor_rows_change_a_sum(dtype: torch.dtype) -> None:
    tensors = given((450, 2100, 70), dtype, torch.float32)
    runs = []
    for count in (1, 2, 3):
        with threads(count):
            runs.append(all_of(ops.linear, *tensors))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    some = ops.linear(tensors[0][7:20], *tensors[1:3])
    assert torch.equal(some, runs[0][0][7:20])


def test_what_is_not_finite_stays_in_its_row(each_isa: str) -> None:
    x, weight, bias, _ = given((30, 40, 50), torch.float32, torch.float32)
    x[3, 5], x[29, 39] = math.nan, math.inf
    for precision in DTYPES:
        finite = ops.linear(x, weight, bias, precision=precision).isfinite().all(1)
        assert finite.tolist() == [row not in (3, 29) for row in range(30)]


def test_nothing_to_add_or_to_keep(either_backend: str) -> None:
    for size in ((0, 3, 4), (3, 0, 4), (3, 4, 0)):
        tensors = given(size, torch.float32, torch.float32)
        check(all_of(ops.linear, *tensors), exact(torch.float32, *tensors), 4)


def test_gradients(either_backend: str) -> None:
    shapes = (2, 3, 5), (4, 5), (4,)
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(ops.linear, (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_registration(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((2, 3, 5), (4, 5), (4,)))
    grad = torch.randn(2, 3, 4, dtype=dtype)
    for b in (bias, None):
        torch.library.opcheck(torch.ops.var_ext.linear, (x, weight, b, False))
    plain = x.detach(), weight.detach(), bias.detach(), False
    for wanted in ([True, True, True], [False, True, False]):
        torch.library.opcheck(torch.ops.var_ext.linear_backward, (grad, *plain, wanted))


GOOD: dict[str, Any] = dict(x=torch.zeros(2, 4), weight=torch.zeros(3, 4), bias=torch.zeros(3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(2, 5)), ValueError, r"x must have shape \(..., N\) = \(..., 4\), got \(2, 5\)"),
        (dict(x=torch.zeros(())), ValueError, r"x must have shape.*got \(\)"),
        (dict(weight=torch.zeros(4)), ValueError, r"weight must have shape \(M, N\).*got \(4,\)"),
        (dict(bias=torch.zeros(4)), ValueError, r"bias must have shape \(M,\) = \(3\), got \(4,\)"),
        (dict(x=torch.zeros(2, 4).half()), TypeError, "x must be float32 or .*got float16"),
        (dict(weight=torch.zeros(3, 4).double()), TypeError, "one dtype, got.*weight float64"),
        (dict(weight=torch.zeros(3, 4, device="meta")), ValueError, "one device, got.*weight on meta"),
        (dict(weight=[1.0]), TypeError, "weight must be a tensor.*got list"),
        (dict(precision=torch.float16), ValueError, "precision must be torch.float32.*got torch.float16"),
    ],
)
def test_bad_input(either_backend: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"linear: .*{message}"):
        ops.linear(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 4).half()), "x must be one of float32, bfloat16, got float16"),
        (dict(x=torch.zeros(4, 2).t()), "x must be contiguous"),
        (dict(x=torch.zeros(())), r"x must have shape \(..., N\), got \(\)"),
        (dict(weight=torch.zeros(3, 5)), r"weight must have shape.*got \(3, 5\)"),
        (dict(bias=torch.zeros(2)), r"bias must have shape.*got \(2,\)"),
        (dict(out=torch.zeros(2, 4)), r"out must have the shape of x but 3 columns, got \(2, 4\)"),
        (dict(out=torch.zeros(2, 3).bfloat16()), "out must be float32, got bfloat16"),
    ],
)
def test_kernel_refuses(change: dict[str, Tensor], message: str) -> None:
    tensors = {**GOOD, "out": torch.zeros(2, 3), **change}
    with pytest.raises(ValueError, match=f"^linear: {message}"):
        _C.linear(*(view(t) for t in tensors.values()), False)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("grad", torch.zeros(2, 4), "grad must have the shape of x but 3 columns"),
        ("grad_x", torch.zeros(2, 3), "grad_x must have the shape of x but 4 columns"),
        ("grad_weight", torch.zeros(3, 4).bfloat16(), "grad_weight must be float32, got bfloat16"),
        ("grad_bias", torch.zeros(4), "grad_bias must have shape"),
    ],
)
def test_backward_kernel_refuses(name: str, wrong: Tensor, message: str) -> None:
    x, weight, bias = GOOD.values()
    tensors = dict(grad=torch.zeros(2, 3), x=x, weight=weight, grad_x=x, grad_weight=weight, grad_bias=bias)
    with pytest.raises(ValueError, match=f"^linear_backward: {message}"):
        _C.linear_backward(*(view(t) for t in {**tensors, name: wrong}.values()), False)
