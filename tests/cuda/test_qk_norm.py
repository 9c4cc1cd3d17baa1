from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.ops import oracle
from tests.ops.test_qk_norm import LAYOUTS, NATIVE, SHAPES, exact, formula, inputs
from var_ext import _C, ops, reference
from var_ext.ops._native import kernels, maybe_view, view

# Odd heads, lengths and channels; heads of 16 bytes to 512, of more, and of no whole number of 16 bytes; heads beyond
# those of a warp, channels beyond a window, tokens beyond a chunk
ODD = [
    (1, 7, 5, 1),
    (2, 1, 3, 7),
    (1, 7, 37, 8),
    (1, 9, 9, 16),
    (2, 9, 1, 20),
    (1, 7, 5, 32),
    (1, 17, 3, 50),
    (3, 43, 5, 64),
    (1, 129, 1, 128),
    (1, 3, 3, 256),
    (1, 3, 2, 300),
]
CASES = list(dict.fromkeys([*ODD, *NATIVE, *SHAPES]))


def moved(gpu: Gpu, tensors: Any) -> list[Any]:
    return [None if t is None else gpu(t) for t in tensors]


def forward(gpu: Gpu, given: Any) -> list[Tensor]:
    return [t.cpu() for t in ops.qk_norm(*moved(gpu, given))]


def backward(gpu: Gpu, given: Any, grads: list[Tensor]) -> list[Tensor]:
    """Gradients of all tensors in `given`; a fourth that is missing is log_scale."""
    return [t.cpu() for t in oracle.gradients(ops.qk_norm, moved(gpu, given), moved(gpu, grads))]


def direct(gpu: Gpu, given: Any) -> list[Tensor]:
    """The kernel on the tensors as they lie: the op copies those whose rows are not aligned."""
    qkv, *rest = moved(gpu, given)
    outputs = [torch.empty_like(qkv[:, :, 0], memory_format=torch.contiguous_format) for _ in range(3)]
    kernels(qkv).qk_norm(*map(maybe_view, (qkv, *rest, *outputs)))
    return [t.cpu() for t in outputs]


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("norm", [True, False])
def test_against_float64(gpu: Gpu, shape: tuple[int, ...], dtype: torch.dtype, norm: bool) -> None:
    """Forward and gradients, as near to float64 as torch is."""
    given = list(inputs(shape, dtype))[: 4 if norm else 3]
    rest = [] if norm else [None]
    results = forward(gpu, given)
    for mine, torchs, truth in zip(results, formula(*given, *rest), exact(*given, *rest), strict=True):
        assert mine.shape == shape
        assert mine.is_contiguous()
        oracle.assert_as_good_as_torch(mine, torchs, truth)

    def plain(*args: Tensor) -> list[Tensor]:
        return formula(*args, *rest)

    if shape[-1] == 1 and norm:
        return  # a norm over one channel has no gradient, and rounding alone is left
    grads = [torch.randn(shape).to(dtype) for _ in range(3)]
    mine_all = backward(gpu, given, grads)
    torch_all = oracle.gradients(plain, given, grads)
    truths = oracle.gradients(plain, [t.double() for t in given], grads)
    if (
        norm and dtype == torch.float32
    ):  # a sum of B L D terms that cancel: the error is measured against them
        mine, truth = mine_all.pop(), truths.pop()
        torch_all.pop()
        terms = (grads[0] * formula(*given)[0]).abs().sum(dim=(0, 1, 3))
        assert ((mine - truth).abs() <= 2 * torch.finfo(dtype).eps * terms).all()
    for mine, torchs, truth in zip(mine_all, torch_all, truths, strict=True):
        oracle.assert_as_good_as_torch(mine, torchs, truth)


@pytest.mark.parametrize("shape", [(2, 65537, 2, 4), (1, 2, 65537, 4), (1, 1, 65537, 1)], ids=str)
def test_large_counts(gpu: Gpu, shape: tuple[int, ...]) -> None:
    """Tokens or heads beyond 65535, which a second axis of a grid could not have."""
    given = inputs(shape)
    given[3].clamp_(max=4.5)
    for mine, truth in zip(forward(gpu, given), exact(*given), strict=True):
        oracle.assert_equal_up_to_rounding(mine, truth)
    if shape[1] < 3 and shape[-1] > 1:
        grads = [torch.randn(shape) for _ in range(3)]
        truths = oracle.gradients(formula, [t.double() for t in given], grads)
        for mine, truth in zip(backward(gpu, given, grads), truths, strict=True):
            torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item())


@pytest.mark.parametrize("channels", [8, 12])
def test_offsets_beyond_32_bits(gpu: Gpu, channels: int) -> None:
    if gpu.level != "emulated":
        pytest.skip("moves 4 GB, of which the emulator touches a few pages")
    shape, far = (2, 3, 2, channels), 2**31

    def spread(x: Tensor) -> Tensor:
        place = torch.empty(far + x[0].numel(), dtype=x.dtype)
        return place.as_strided(x.shape, (far, *x.stride()[1:])).copy_(x)

    given, grads = list(inputs(shape, torch.bfloat16)), list(torch.randn(3, *shape).bfloat16())
    outputs = [spread(torch.zeros(shape, dtype=torch.bfloat16)) for _ in range(3)]
    apart = [spread(given[0]), *given[1:]]
    kernels(apart[0]).qk_norm(*map(view, (*apart, *outputs)))
    for mine, want in zip(outputs, forward(gpu, given), strict=True):
        assert torch.equal(mine, want)
    leaves = [t.requires_grad_() for t in apart]
    back = torch.autograd.grad(ops.qk_norm(*leaves), leaves, [spread(t) for t in grads])
    for mine, want in zip(back, backward(gpu, given, grads), strict=True):
        assert torch.equal(mine, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [20, 64])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_layouts(gpu: Gpu, layout: str, channels: int, dtype: torch.dtype) -> None:
    """Strides and places that 16-byte accesses fit or not, through the op and in the kernel itself."""
    place = LAYOUTS[layout]
    shape = (2, 5, 3, channels)
    given = [place(t) for t in inputs(shape, dtype)]
    plain = [t.contiguous() for t in given]
    torchs, truths = formula(*plain), exact(*plain)
    results = [forward(gpu, given)]
    if layout != "strided channels":
        results.append(direct(gpu, given))
    for result in results:
        for mine, torchs_own, truth in zip(result, torchs, truths, strict=True):
            oracle.assert_as_good_as_torch(mine, torchs_own, truth)
    grads = [place(torch.randn(shape).to(dtype)) for _ in range(3)]
    leaves = [t.requires_grad_() for t in moved(gpu, given)]
    back = torch.autograd.grad(ops.qk_norm(*leaves), leaves, moved(gpu, grads))
    for mine, want in zip(back, backward(gpu, plain, [t.contiguous() for t in grads]), strict=True):
        assert torch.equal(mine.cpu(), want)


@pytest.mark.parametrize("channels", [20, 64])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_unaligned_gradients(gpu: Gpu, channels: int, dtype: torch.dtype) -> None:
    """The backward kernel itself, where each tensor in turn lies off the alignment."""
    shape = (2, 9, 3, channels)
    given, grads = list(inputs(shape, dtype)), [torch.randn(shape).to(dtype) for _ in range(3)]
    torchs = oracle.gradients(formula, given, grads)
    truths = oracle.gradients(formula, [t.double() for t in given], grads)
    tensors = [*grads, given[0], given[1]]
    outputs = [torch.empty_like(given[0]), torch.empty_like(given[1]), torch.empty_like(given[1])]
    for off in range(-1, 6):
        placed = [gpu(oracle.unaligned(t) if i == off else t) for i, t in enumerate(tensors)]
        results = [gpu(oracle.unaligned(t) if off == 5 and i == 0 else t) for i, t in enumerate(outputs)]
        log_scale, of_log_scale = gpu(given[3]), gpu(torch.empty_like(given[3]))
        sums = gpu(torch.empty(3, 3, 2 * channels + 1))
        kernels(placed[0]).qk_norm_backward(
            *map(view, placed), view(log_scale), *map(view, results), view(of_log_scale), view(sums)
        )
        for mine, torchs_own, truth in zip(results, torchs, truths, strict=False):
            oracle.assert_as_good_as_torch(mine.cpu(), torchs_own, truth)
        terms = (grads[0].double() * exact(*given)[0]).abs().sum(dim=(0, 1, 3))
        eps = torch.finfo(dtype).eps
        assert ((of_log_scale.cpu() - truths[3]).abs() <= eps * truths[3].abs() + 4e-7 * terms).all()


@pytest.mark.parametrize("channels", [24, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_and_special_heads(gpu: Gpu, channels: int, dtype: torch.dtype) -> None:
    """Zero, shorter than 1e-12, so long that the square overflows, NaN and infinite: forward and gradients as torch."""
    shape = (1, 5, 2, channels)
    qkv, q_bias, v_bias, log_scale = inputs(shape, dtype)
    q_bias.zero_()
    qkv[:, 0] = 0
    qkv[:, 1] *= 1e-14
    qkv[:, 2] *= 1e25
    qkv[:, 3, :, :, 3] = math.nan
    qkv[:, 4, :, :, 7] = math.inf
    given = [qkv, q_bias, v_bias, log_scale]
    tolerance = dict(rtol=2e-2, atol=1e-5) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-6)
    for mine, torchs in zip(forward(gpu, given), formula(*(t.float() for t in given)), strict=True):
        torch.testing.assert_close(mine, torchs.to(dtype), equal_nan=True, **tolerance)  # type: ignore[arg-type]
    grads = [torch.randn(shape).to(dtype) for _ in range(3)]
    mine = backward(gpu, given, grads)[0][:, :2]
    truth = oracle.gradients(reference.qk_norm, [t.double() for t in given], grads)[0][:, :2]
    # 1e12 is the slope of a short head
    torch.testing.assert_close(mine.double(), truth, rtol=tolerance["rtol"], atol=1e12 * tolerance["rtol"])


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_the_scale_is_capped_at_100(gpu: Gpu, dtype: torch.dtype) -> None:
    """Its gradient passes at the cap itself, as in clamp_max; bfloat16 has no log 100: it rounds to above or below."""
    for channels in (8, 11):
        log_scale = torch.tensor([1.0, math.log(100), 4.7, 50.0, math.nan]).to(dtype)
        given = [*inputs((2, 3, 5, channels), dtype)[:3], log_scale]
        norms = forward(gpu, given)[0].double().norm(dim=-1)
        wanted = log_scale.double().exp().clamp_max(100).expand_as(norms)
        torch.testing.assert_close(norms, wanted, rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True)
        grads = [torch.randn(2, 3, 5, channels).to(dtype) for _ in range(3)]
        of_scale = backward(gpu, given, grads)[3]
        below = log_scale.float() <= torch.tensor(math.log(100))
        assert torch.equal(of_scale == 0, ~below & ~log_scale.isnan())
        assert torch.equal(of_scale.isnan(), log_scale.isnan())


@pytest.mark.parametrize("channels", [8, 11])
def test_without_a_norm_gradients_do_not_see_qkv(gpu: Gpu, channels: int) -> None:
    given = list(inputs((1, 5, 3, channels)))[:3]
    given[0][0, 1], given[1][1] = math.inf, math.nan
    grads = [torch.randn(1, 5, 3, channels) for _ in range(3)]
    results = backward(gpu, given, grads)
    assert torch.equal(results[0], torch.stack(grads, dim=2))
    for mine, grad in zip(results[1:], (grads[0], grads[2]), strict=True):
        oracle.assert_equal_up_to_rounding(mine, grad.sum(dim=(0, 1)))


@pytest.mark.parametrize("channels", [50, 64])
def test_the_order_of_threads_changes_no_bit(gpu: Gpu, channels: int) -> None:
    given, grads = inputs((2, 150, 5, channels)), list(torch.randn(3, 2, 150, 5, channels))
    runs = []
    for seed in range(3):
        if gpu.level == "emulated":
            emulation.emulator().seed(seed)
        runs.append([*forward(gpu, given), *backward(gpu, given, grads)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("shape", [(1, 20, 5, 64), (1, 20, 3, 16), (1, 20, 2, 50)], ids=str)
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_no_bank_conflicts(traced: Gpu, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    backward(traced, inputs(shape, dtype), [torch.randn(shape).to(dtype) for _ in range(3)])
    assert traced.conflicts() == []


def test_the_kernel_refuses(gpu: Gpu) -> None:
    run = kernels(gpu(torch.zeros(1)))
    qkv, grad, bias = gpu(torch.zeros(1, 2, 3, 2, 8)), gpu(torch.zeros(1, 2, 2, 8)), gpu(torch.zeros(2, 8))
    grads = [grad, grad, grad, qkv, bias]

    def backward_with(sums: Tensor | None) -> None:
        run.qk_norm_backward(
            *map(view, grads), None, view(torch.empty_like(qkv)), view(torch.empty_like(bias)),
            view(torch.empty_like(bias)), None, maybe_view(sums),
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"qk_norm: scratch must have shape .* on CUDA, got none"):
        backward_with(None)
    with pytest.raises(ValueError, match=r"scratch must have shape \(P, 2, 17\), got \(1, 2, 16\)"):
        backward_with(gpu(torch.zeros(1, 2, 16)))
    many = 2**31
    packed = _C.TensorView(qkv.data_ptr(), (1, many, 3, 1, 1), (0, 0, 0, 0, 1), _C.DType.float32)
    output = _C.TensorView(qkv.data_ptr(), (1, many, 1, 1), (many, 1, 1, 1), _C.DType.float32)
    one = view(bias[:1, :1])
    with pytest.raises(ValueError, match=r"qk_norm: B \* L \* H must be below 2\^31 on CUDA, got 2147483648"):
        run.qk_norm(packed, one, one, None, output, output, output)
