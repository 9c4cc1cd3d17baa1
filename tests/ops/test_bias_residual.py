from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.ops import oracle
from tests.threads import threads
from var_ext import _C, ops
from var_ext.ops._native import view

SHAPES = [
    (1, 4, 1, 1),
    (2, 32, 7, 5),
    (1, 96, 9, 16),
    (3, 6, 1, 151),
    (0, 8, 4, 4),
    (2, 3, 0, 4),
    (5, 1, 3, 3),
]
FORMATS = (torch.contiguous_format, torch.channels_last)
layouts = pytest.mark.parametrize("memory_format", FORMATS, ids=("contiguous", "channels_last"))
in_places = pytest.mark.parametrize("in_place", [False, True], ids=("new", "in_place"))


def exact(h: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    return h.double() + bias.double()[:, None, None] + x.double()


def example(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> tuple[Tensor, Tensor, Tensor]:
    h, x = (torch.randn(shape).to(dtype).to(memory_format=memory_format) for _ in range(2))
    return h, x, torch.randn(shape[1]).to(dtype)


def check(result: Tensor, h: Tensor, x: Tensor, bias: Tensor) -> None:
    """One rounding of a sum in float32: half a unit, and two of float32's on the way."""
    assert result.dtype == h.dtype
    eps = torch.finfo(h.dtype).eps / 2
    tiny = 3 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(result.double(), exact(h, x, bias), rtol=eps, atol=tiny * 4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", oracle.LOW)
@layouts
@in_places
def test_against_float64(
    either_backend: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    in_place: bool,
) -> None:
    h, x, bias = example(shape, dtype, memory_format)
    before = h.clone()
    result = ops.bias_residual(h, x, bias, in_place=in_place)
    check(result, before, x, bias)
    assert not h.numel() or result.is_contiguous(memory_format=memory_format)
    assert not h.numel() or (result.data_ptr() == h.data_ptr()) == in_place
    assert torch.equal(h, result if in_place else before)


@pytest.mark.parametrize("dtype", oracle.LOW)
@layouts
def test_each_variant(each_isa: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    for shape in (*SHAPES, (2, 40, 65, 33)):
        h, x, bias = example(shape, dtype, memory_format)
        check(ops.bias_residual(h, x, bias), h, x, bias)
        check(ops.bias_residual(h.clone(), x, bias, in_place=True), h, x, bias)


@layouts
@in_places
def test_any_strides(each_isa: str, memory_format: torch.memory_format, in_place: bool) -> None:
    """x in the other layout, expanded, or a part; h a part; one element off; parameters apart."""
    other = FORMATS[1 - FORMATS.index(memory_format)]
    h, x, _ = example((2, 6, 9, 5), torch.float32, memory_format)
    bias = torch.randn(6, 2)[:, 1]
    wide = torch.randn(2, 12, 9, 10)
    off = torch.randn(h.numel() + 1)[1:].as_strided(h.shape, h.stride())
    for branch, stream in (
        (h, x.to(memory_format=other)),
        (h, torch.randn(2, 6, 1, 1).expand(h.shape)),
        (h, wide[:, ::2, :, ::2]),
        (wide[:, ::2, :, ::2], x),
        (off, x),
        (h, off),
    ):
        before = branch.clone()
        result = ops.bias_residual(branch, stream, bias, in_place=in_place)
        check(result, before, stream, bias)
        assert torch.equal(branch, result if in_place else before)


def test_the_stream_itself_may_be_the_branch(each_isa: str) -> None:
    h, _, bias = example((2, 6, 9, 5), torch.float32, torch.channels_last)
    before = h.clone()
    check(ops.bias_residual(h, h, bias, in_place=True), before, before, bias)


@pytest.mark.parametrize("dtype", oracle.LOW)
@layouts
def test_special_values(each_isa: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    h, x, bias = example((1, 5, 4, 5), dtype, memory_format)
    h[0, 1, 2, 3], x[0, 2, 1, 0], bias[4] = math.nan, math.inf, -math.inf
    result = ops.bias_residual(h, x, bias)
    assert torch.equal(result.isnan(), h.isnan())
    assert torch.equal(result.isposinf(), x.isposinf())
    assert torch.equal(result.isneginf(), torch.zeros_like(h) + bias[:, None, None] == -math.inf)


@layouts
def test_thread_count_changes_nothing(memory_format: torch.memory_format) -> None:
    given = example((3, 40, 61, 43), torch.bfloat16, memory_format)
    runs = []
    for count in (1, 2, 3):
        with threads(count):
            runs.append(ops.bias_residual(*given))
    assert all(torch.equal(run, runs[0]) for run in runs)


@in_places
def test_there_is_no_gradient(either_backend: str, in_place: bool) -> None:
    h, x, bias = example((1, 4, 3, 3), torch.float32, torch.channels_last)
    result = ops.bias_residual(h, x.requires_grad_(), bias.requires_grad_(), in_place=in_place)
    assert not result.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@layouts
def test_registration(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    given = example((2, 4, 3, 3), dtype, memory_format)
    torch.library.opcheck(torch.ops.var_ext.bias_residual, given)
    torch.library.opcheck(torch.ops.var_ext.bias_residual_in_place, given)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(h=torch.zeros(4, 3, 3)), ValueError, r"h must have shape \(B, C, H, W\).*got \(4, 3, 3\)"),
        (
            dict(x=torch.zeros(1, 4, 3, 2)),
            ValueError,
            r"x must have shape.*\(1, 4, 3, 3\), got \(1, 4, 3, 2\)",
        ),
        (dict(x=torch.zeros(1, 4, 1, 1)), ValueError, r"x must have shape.*got \(1, 4, 1, 1\)"),
        (dict(bias=torch.zeros(5)), ValueError, r"bias must have shape \(C,\) = \(4\), got \(5,\)"),
        (dict(h=torch.zeros(1, 4, 3, 3).int()), TypeError, "h must be float32.*got int32"),
        (dict(x=torch.zeros(1, 4, 3, 3).half()), TypeError, "one dtype, got.*x float16"),
        (dict(bias=torch.zeros(4, device="meta")), ValueError, "one device, got.*bias on meta"),
        (dict(x=[1.0]), TypeError, "x must be a tensor.*got list"),
    ],
)
@in_places
def test_bad_input(
    either_backend: str, change: dict[str, object], error: type[Exception], message: str, in_place: bool
) -> None:
    given = dict(h=torch.zeros(1, 4, 3, 3), x=torch.zeros(1, 4, 3, 3), bias=torch.zeros(4))
    with pytest.raises(error, match=f"bias_residual: .*{message}"):
        ops.bias_residual(**{**given, **change}, in_place=in_place)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(h=torch.zeros(1, 4, 3, 3).double()), "h must be one of float32, .*, got float64"),
        (dict(h=torch.zeros(4, 3, 3)), r"h must have shape \(B, C, H, W\), got \(4, 3, 3\)"),
        (dict(h=torch.zeros(1, 4, 3, 6)[..., ::2]), "h must be contiguous or channels-last"),
        (dict(x=torch.zeros(1, 4, 3, 3).half()), "x must be float32, got float16"),
        (dict(x=torch.zeros(1, 3, 3, 4).permute(0, 3, 1, 2)), "x must be contiguous, as h is"),
        (dict(bias=torch.zeros(5)), r"bias must have shape \(4,\), got \(5,\)"),
        (dict(bias=torch.zeros(8)[::2]), "bias must be contiguous"),
        (dict(out=torch.zeros(1, 4, 3, 2)), r"out must have shape \(1, 4, 3, 3\), got \(1, 4, 3, 2\)"),
        (dict(out=torch.zeros(1, 3, 3, 4).permute(0, 3, 1, 2)), "out must be contiguous, as h is"),
    ],
)
def test_kernel_refuses(change: dict[str, Tensor], message: str) -> None:
    maps = (torch.zeros(1, 4, 3, 3) for _ in range(3))
    given = {**dict(zip(("h", "x", "out"), maps, strict=True)), "bias": torch.zeros(4), **change}
    with pytest.raises(ValueError, match=f"^bias_residual: {message}"):
        _C.bias_residual(*(view(given[name]) for name in ("h", "x", "bias", "out")))
