from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.ops import oracle
from tests.threads import threads
from var_ext import _C, ops, reference
from var_ext.ops._native import view

# Rows around the vectors of every variant, a quarter of what a step takes, and several axes
SHAPES = [(1,), (7, 33), (2, 151, 64), (3, 1, 129), (0, 16), (5, 1), (2, 0, 3), (2, 3, 4, 15), (3, 271)]


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    """What the contract says, in float64 with each rounding spelt out; rows must be finite."""
    x = x.double()
    largest = x.abs().amax(dim=-1, keepdim=True)
    quotient = (largest / 127).float()
    scale = quotient.bfloat16()
    scale = torch.where(scale.float() < quotient, scale.nextafter(torch.full_like(scale, torch.inf)), scale)
    scale = torch.where(largest == 0, 1, scale.double().clamp_min(2.0**-120))
    product = (x * (1 / scale).float().double()).float()
    return product.round().add(128).clamp(1, 255).to(torch.uint8), scale.float()


def assert_same(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Equal bits, NaN for NaN; dense tensors of the right types."""
    (q, scale), (right_q, right_scale) = result, expected
    assert (q.dtype, scale.dtype) == (torch.uint8, torch.float32)
    assert q.is_contiguous() and scale.is_contiguous()
    assert torch.equal(q, right_q)
    torch.testing.assert_close(scale, right_scale, rtol=0, atol=0, equal_nan=True)


def random_bits(rows: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Numbers of all magnitudes, each row below a bound of its own; no NaN, no infinity."""
    finfo = torch.finfo(dtype)
    bound = torch.linspace(
        math.log2(finfo.smallest_normal) - 8, math.log2(finfo.max), rows, dtype=torch.float64
    )
    return ((torch.rand(rows, channels) * 2 - 1) * 2 ** bound[:, None]).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_against_float64(either_backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype) * 3
    assert_same(ops.quantize_rows(x), exact(x))
    assert ops.quantize_rows(x)[1].shape == (*shape[:-1], 1)


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_each_variant(each_isa: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        assert_same(ops.quantize_rows(x), exact(x))
    for channels in (1, 3, 70):
        x = random_bits(600, channels, dtype)
        assert_same(ops.quantize_rows(x), exact(x))
        assert_same(ops.quantize_rows(x), reference.quantize_rows(x))


def test_every_bfloat16_as_the_largest(each_isa: str) -> None:
    """No quotient leaves [-127, 127], and the error is half a step."""
    largest = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)
    x = torch.stack([largest, -largest, largest / 3, largest / 7], dim=1)
    q, scale = ops.quantize_rows(x)
    assert_same((q, scale), exact(x))
    assert torch.equal(scale.bfloat16().float(), scale)
    number = q.double() - 128
    assert torch.equal(number[:, 0], -number[:, 1])
    assert ((number * scale.double() - x.double()).abs() <= scale.double() * (0.5 + 2.0**-15)).all()
    normal = largest >= 2.0**-113
    assert number[normal, 0].min() == 126 and number.max() == 127


def test_ties_go_to_even(each_isa: str) -> None:
    for power in (-100, 0, 90):
        numbers = [*torch.arange(-126.5, 127.5, 0.5).tolist(), 127.0]
        q, scale = ops.quantize_rows(torch.tensor(numbers) * 2.0**power)
        assert scale.item() == 2.0**power
        assert q.tolist() == [128 + round(number) for number in numbers]


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_zeros_and_tiny_rows(each_isa: str, dtype: torch.dtype) -> None:
    x = torch.zeros(6, 37, dtype=dtype)
    x[1] = -0.0
    x[2, 5] = torch.finfo(dtype).smallest_normal / 8
    x[3, 36] = -torch.finfo(dtype).smallest_normal
    x[4:] = x[2:3] * 3
    q, scale = ops.quantize_rows(x)
    assert scale[:2].eq(1).all() and q[:2].eq(128).all()
    assert_same((q, scale), exact(x))
    if dtype != torch.float16:
        assert scale[2:].eq(2.0**-120).all() and q.eq(128).all()


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 63, 68])
def test_special_values(each_isa: str, special: float, place: int, dtype: torch.dtype) -> None:
    """NaN and infinity are told by the scale, of their row alone."""
    x = torch.randn(5, 69).to(dtype)
    x[1, place], x[3, place] = special, -special
    x[3, 7] = math.nan
    q, scale = ops.quantize_rows(x)
    assert_same((q, scale), reference.quantize_rows(x))
    assert scale[1::2].isnan().all() and q[1::2].eq(128).all()
    assert_same((q[::2].contiguous(), scale[::2].contiguous()), exact(x[::2]))
    assert_same(
        ops.quantize_rows(torch.full((2, 3), special)), reference.quantize_rows(torch.full((2, 3), special))
    )


def test_any_strides(each_isa: str) -> None:
    wide = torch.randn(6, 5, 80).bfloat16()
    for x in (
        wide[..., 3:68],  # rows at equal distances, one element off
        wide[::2, 1:3, :65],  # rows at two distances
        wide.transpose(0, 1)[..., :65],
        wide.transpose(0, 2)[:65].transpose(0, 2),
        wide[..., ::2],
        wide[..., 7:8],
        wide[:, :1].expand(6, 5, 80),
        wide[0, 0, ::3],
        oracle.unaligned(wide),
    ):
        assert_same(ops.quantize_rows(x), exact(x))


def test_thread_count_changes_nothing() -> None:
    x = torch.randn(700, 257)
    runs = []
    for count in (1, 2, 3):
        with threads(count):
            runs.append(ops.quantize_rows(x))
    for run in runs:
        assert_same(run, exact(x))


def test_no_gradient(either_backend: str) -> None:
    q, scale = ops.quantize_rows(torch.randn(3, 5, requires_grad=True))
    assert not q.requires_grad and not scale.requires_grad


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_registration(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5).to(dtype)
    for given in (x, x.transpose(0, 1), x[..., ::2]):
        torch.library.opcheck(torch.ops.var_ext.quantize_rows, (given,))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(()), ValueError, r"x must have shape \(..., C\) with C >= 1, got \(\)"),
        (torch.zeros(3, 0), ValueError, r"x must have shape.*got \(3, 0\)"),
        (torch.zeros(2, 4).double(), TypeError, "x must be float32 or bfloat16 or float16, got float64"),
        (torch.zeros(2, 4).byte(), TypeError, "x must be float32 or .*got uint8"),
        ([1.0], TypeError, "x must be a tensor.*got list"),
    ],
)
def test_bad_input(either_backend: str, x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^quantize_rows: {message}"):
        ops.quantize_rows(x)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 4).double()), "x must be one of float32, bfloat16, float16, got float64"),
        (dict(x=torch.zeros(8)), r"x must have shape \(R, C\), got \(8,\)"),
        (dict(x=torch.zeros(2, 0)), r"x must have at least one channel, got shape \(2, 0\)"),
        (dict(x=torch.zeros(2, 8)[:, ::2]), "x must have dense channels, got a stride of 2"),
        (dict(q=torch.zeros(2, 4)), "q must be uint8, got float32"),
        (dict(q=torch.zeros(2, 3).byte()), r"q must have shape \(2, 4\), got \(2, 3\)"),
        (
            dict(q=torch.zeros(2, 5).byte()[:, :4]),
            r"q must be contiguous, got shape \(2, 4\) with strides \(5, 1\)",
        ),
        (dict(scale=torch.zeros(2).half()), "scale must be float32, got float16"),
        (dict(scale=torch.zeros(2, 1)), r"scale must have shape \(2,\), got \(2, 1\)"),
        (dict(scale=torch.zeros(4)[::2]), "scale must be contiguous"),
    ],
)
def test_kernel_refuses(change: dict[str, Tensor], message: str) -> None:
    given = dict(x=torch.zeros(2, 4), q=torch.zeros(2, 4).byte(), scale=torch.zeros(2)) | change
    with pytest.raises(ValueError, match=f"^quantize_rows: {message}"):
        _C.quantize_rows(*(view(t) for t in given.values()))
