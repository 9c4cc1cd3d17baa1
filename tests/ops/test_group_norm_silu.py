from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ops import oracle
from tests.threads import threads
from var_ext import _C, ops
from var_ext.ops._native import view

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
    oracle.assert_as_good_as_torch(result, torchs(x, weight, bias, groups), exact(x, weight, bias, groups))


def gradients(
    x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, groups: int, function: Callable[..., Tensor]
) -> tuple[Tensor, ...]:
    given = [t.detach().requires_grad_() for t in (x, weight, bias)]
    return torch.autograd.grad(function(*given, groups), given, grad)


def native(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return ops.group_norm_silu(x, weight, bias, groups=groups)


def torchs(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, 1e-6))


@pytest.mark.parametrize("shape", [*SHAPES, (2, 64, 33, 17, 32), (5, 40, 8, 8, 8)])
@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_each_variant(
    each_isa: str, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    *size, groups = shape
    x, grad = (torch.randn(size).to(dtype).to(memory_format=memory_format) for _ in range(2))
    weight, bias = torch.randn(2, size[1]).to(dtype)
    given = (x, weight, bias)
    oracle.assert_as_good_as_torch(native(*given, groups), torchs(*given, groups), exact(*given, groups))
    results = gradients(*given, grad, groups, native)
    assert not x.numel() or results[0].is_contiguous(memory_format=memory_format)
    for result, torch_result, right in zip(
        results,
        gradients(*given, grad, groups, torchs),
        gradients(*(t.double() for t in (*given, grad)), groups, exact),
        strict=True,
    ):
        oracle.assert_as_good_as_torch(result, torch_result, right)


def native_added(x: Tensor, weight: Tensor, bias: Tensor, input_bias: Tensor, groups: int) -> Tensor:
    return ops.group_norm_silu(x, weight, bias, groups=groups, input_bias=input_bias)


def torchs_added(x: Tensor, weight: Tensor, bias: Tensor, input_bias: Tensor, groups: int) -> Tensor:
    return torchs(x + input_bias[:, None, None], weight, bias, groups)


def exact_added(x: Tensor, weight: Tensor, bias: Tensor, input_bias: Tensor, groups: int) -> Tensor:
    return exact(x.double() + input_bias.double()[:, None, None], weight, bias, groups)


def example_added(
    size: list[int], dtype: torch.dtype, memory_format: torch.memory_format
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, input_bias, grad: parameters apart in memory, biases as large as the spread of x."""
    x, grad = (torch.randn(size).to(dtype).to(memory_format=memory_format) for _ in range(2))
    weight, bias, input_bias = torch.randn(size[1], 3).to(dtype).unbind(1)
    return x, weight, bias, input_bias, grad


def compare_added(results: list[Tensor], given: tuple[Tensor, ...], groups: int) -> None:
    """The output and the gradients of x, weight, bias and input_bias.

    Kernels round "mean less input_bias" once for a channel, so in float32 errors of the terms of a sum over pixels do
    not cancel: each term, itself three products, may be off by four roundings.
    """
    *inputs, grad = given

    def all_of(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
        gradients = oracle.gradients(lambda *t: function(*t, groups), tensors, [grad])
        return [function(*tensors, groups), *gradients]

    owns, truths = all_of(torchs_added, inputs), all_of(exact_added, [t.double() for t in inputs])
    for i, (result, own, truth) in enumerate(zip(results, owns, truths, strict=True)):
        if i > 1 and grad.dtype == torch.float32 and grad.numel():
            terms = (truths[1] if i == 4 else grad).abs().sum((0, 2, 3)).max().item()
            error = (result.double() - truth).abs().max().item()
            assert error <= 4 * torch.finfo(torch.float32).eps * terms, f"error {error:.3g} of {terms:.3g}"
        else:
            oracle.assert_as_good_as_torch(result, own, truth)


ADDED = [
    (1, 4, 1, 3, 2),
    (2, 64, 7, 5, 32),
    (1, 96, 9, 16, 32),
    (3, 6, 1, 151, 3),
    (0, 8, 4, 4, 2),
    (5, 40, 9, 8, 8),
]


@pytest.mark.parametrize("shape", ADDED)
@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_input_bias(
    either_backend: str, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    check_input_bias(shape, dtype, memory_format)


@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_input_bias_in_each_variant(
    each_isa: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    for shape in (*ADDED, (2, 64, 33, 17, 32)):
        check_input_bias(shape, dtype, memory_format)


def check_input_bias(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    *size, groups = shape
    given = example_added(size, dtype, memory_format)
    y = native_added(*given[:4], groups)
    assert not y.numel() or y.is_contiguous(memory_format=memory_format)
    grads = oracle.gradients(lambda *t: native_added(*t, groups), given[:4], [given[4]])
    compare_added([y, *grads], given, groups)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_large_input_bias_costs_no_precision(each_isa: str, memory_format: torch.memory_format) -> None:
    """Channels apart by 1000 times their spread, which the biases bring together; then biases that part them."""
    weight, bias, far = torch.ones(6), torch.zeros(6), torch.arange(6.0) * 1000 - 2000
    for x, input_bias in (
        (torch.randn(1, 6, 65, 63) - far[:, None, None], far),
        (torch.randn(1, 6, 65, 63), far),
        (torch.randn(1, 6, 65, 63) + 1000, torch.full((6,), 0.25)),
    ):
        x = x.to(memory_format=memory_format)
        result = native_added(x, weight, bias, input_bias, 2)
        truth = exact_added(x, weight, bias, input_bias, 2)
        # x itself is rounded to 1e-4 where channels are apart
        torch.testing.assert_close(result.double(), truth, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_without_input_bias_no_bit_changes(each_isa: str, memory_format: torch.memory_format) -> None:
    """On channels-last maps: contiguous ones are summed up map by map where something is added."""
    x, weight, bias, _, _ = example_added([2, 40, 21, 19], torch.bfloat16, memory_format)
    plain, zeros = native(x, weight, bias, 8), native_added(x, weight, bias, torch.zeros_like(bias), 8)
    if memory_format == torch.channels_last:
        assert torch.equal(plain, zeros)
    oracle.assert_as_good_as_torch(zeros, plain, exact(x, weight, bias, 8))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_gradient_in_the_other_layout(either_backend: str, memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 8, 5, 6).to(memory_format=memory_format)
    weight, bias = torch.randn(2, 8)
    other = FORMATS[1] if memory_format == FORMATS[0] else FORMATS[0]
    for grad in (torch.randn_like(x).to(memory_format=other), torch.randn(2, 8, 1, 1).expand(x.shape)):
        results = gradients(x, weight, bias, grad, 4, native)
        rights = gradients(*(t.double() for t in (x, weight, bias, grad)), 4, exact)
        for result, right in zip(results, rights, strict=True):
            oracle.assert_equal_up_to_rounding(result, right)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_thread_count_changes_nothing(memory_format: torch.memory_format) -> None:
    for batch in (1, 7):  # chunks of an image shared by threads, and an image each
        x, grad = (torch.randn(batch, 40, 41, 43).to(memory_format=memory_format) for _ in range(2))
        weight, bias = torch.randn(2, 40)
        runs = []
        for count in (1, 2, 3):
            with threads(count):
                runs.append(
                    (native(x, weight, bias, 8), *gradients(x, weight, bias, grad, 8, native)),
                )
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_special_values_stay_in_their_group(
    each_isa: str, memory_format: torch.memory_format, special: float
) -> None:
    x = torch.randn(2, 6, 9, 5)
    x[0, 3, 4, 1] = special
    x = x.to(memory_format=memory_format)
    result = native(x, torch.ones(6), torch.zeros(6), 3)
    wanted = torch.zeros(2, 6, 9, 5, dtype=torch.bool)
    wanted[0, 2:4] = True
    assert torch.equal(result.isnan(), wanted)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_unaligned(each_isa: str, memory_format: torch.memory_format) -> None:
    place = torch.randn(2 * 6 * 9 * 5 + 1)[1:]
    x = place.view(2, 9, 5, 6).permute(0, 3, 1, 2) if memory_format == FORMATS[1] else place.view(2, 6, 9, 5)
    weight, bias = torch.randn(2, 7)[:, 1:]
    oracle.assert_equal_up_to_rounding(native(x, weight, bias, 3), exact(x, weight, bias, 3))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_start_unlike_the_rest(each_isa: str, memory_format: torch.memory_format) -> None:
    """The shift that keeps a mean from cancelling is taken from a few pixels: they may be outliers."""
    x = torch.randn(1, 4, 64, 64) + 100
    x[:, :, ::4, 0] = -1000
    weight, bias = torch.ones(4), torch.zeros(4)
    result = native(x.to(memory_format=memory_format), weight, bias, 2)
    torch.testing.assert_close(result.double(), exact(x, weight, bias, 2), rtol=1e-4, atol=1e-4)


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


def test_nor_in_channels_last(each_isa: str) -> None:
    # torch's own group norm does lose it in this layout
    x = torch.randn(1, 4, 65, 63) + 1000
    weight, bias = torch.ones(4), torch.zeros(4)
    result = native(x.to(memory_format=torch.channels_last), weight, bias, 2)
    torch.testing.assert_close(result.double(), exact(x, weight, bias, 2), rtol=1e-4, atol=1e-4)


def test_eps(either_backend: str) -> None:
    x, weight, bias = torch.randn(1, 4, 3, 3) * 1e-3, torch.randn(4), torch.randn(4)
    result = ops.group_norm_silu(x, weight, bias, groups=2, eps=0.1)
    oracle.assert_equal_up_to_rounding(result, exact(x, weight, bias, 2, eps=0.1))


def test_gradients(either_backend: str) -> None:
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *given: ops.group_norm_silu(*given, groups=2), (x, weight, bias))
    input_bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *given: native_added(*given, 2), (x, weight, bias, input_bias))
    (alone,) = torch.autograd.grad(native_added(x.detach(), weight, bias, input_bias, 2).sum(), input_bias)
    assert alone.shape == (4,)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_registration(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 4, 3, 3).to(memory_format=memory_format).requires_grad_()
    weight, bias, input_bias = (torch.randn(4, requires_grad=True) for _ in range(3))
    torch.library.opcheck(torch.ops.var_ext.group_norm_silu, (x, weight, bias, None, 2, 1e-6))
    torch.library.opcheck(torch.ops.var_ext.group_norm_silu, (x, weight, bias, input_bias, 2, 1e-6))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(4, 3, 3)), ValueError, r"x must have shape \(B, C, H, W\).*got \(4, 3, 3\)"),
        (dict(weight=torch.zeros(5)), ValueError, r"weight must have shape \(C,\) = \(4\), got \(5,\)"),
        (dict(bias=torch.zeros(4, 1)), ValueError, r"bias must have shape.*got \(4, 1\)"),
        (
            dict(input_bias=torch.zeros(5)),
            ValueError,
            r"input_bias must have shape \(C,\) = \(4\), got \(5,\)",
        ),
        (dict(input_bias=torch.zeros(4).half()), TypeError, "one dtype, got.*input_bias float16"),
        (dict(input_bias=torch.zeros(4, device="meta")), ValueError, "one device, got.*input_bias on meta"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(1, 4, 3, 3).double()), "x must be one of float32, .*, got float64"),
        (dict(x=torch.zeros(4, 3, 3)), r"x must have shape \(B, C, H, W\), got \(4, 3, 3\)"),
        (dict(x=torch.zeros(1, 4, 3, 6)[..., ::2]), "x must be contiguous or channels-last"),
        (dict(weight=torch.zeros(5)), r"weight must have shape \(4,\), got \(5,\)"),
        (dict(bias=torch.zeros(4).half()), "bias must be float32, got float16"),
        (dict(input_bias=torch.zeros(5)), r"input_bias must have shape \(4,\), got \(5,\)"),
        (dict(input_bias=torch.zeros(4).half()), "input_bias must be float32, got float16"),
        (dict(out=torch.zeros(1, 4, 3, 2)), r"out must have shape \(1, 4, 3, 3\), got \(1, 4, 3, 2\)"),
        (dict(out=torch.zeros(1, 3, 3, 4).permute(0, 3, 1, 2)), "out must be contiguous, as x is"),
        (dict(groups=3), "groups must divide C = 4, got 3"),
    ],
)
def test_kernel_refuses(change: dict[str, object], message: str) -> None:
    zeros = torch.zeros(1, 4, 3, 3)
    given = {
        **dict(
            x=zeros, weight=torch.ones(4), bias=torch.zeros(4), input_bias=None, out=zeros.clone(), groups=2
        ),
        **change,
    }
    views = {name: view(value) if isinstance(value, Tensor) else value for name, value in given.items()}
    x, weight, bias, input_bias, out, groups = views.values()
    with pytest.raises(ValueError, match=f"^group_norm_silu: {message}"):
        _C.group_norm_silu(x, weight, bias, input_bias, out, None, None, groups, 1e-6)
    four = view(torch.zeros(4))
    with pytest.raises(ValueError, match=f"^group_norm_silu_backward: {message.replace('out', 'grad_x')}"):
        _C.group_norm_silu_backward(
            view(zeros), x, weight, bias, input_bias, out, four, four, None, None, None, groups, 1e-6
        )
