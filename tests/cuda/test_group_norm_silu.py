from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.ops import oracle
from tests.ops.test_group_norm_silu import (
    ADDED,
    FORMATS,
    SHAPES,
    compare_added,
    exact,
    exact_added,
    example_added,
    gradients,
    native,
    native_added,
    torchs,
)
from var_ext import _C, ops
from var_ext.ops._native import kernels, maybe_view, multiprocessors, view
from var_ext.ops.group_norm_silu import _chunks

# Groups within and across 16 bytes, channels of the decoder, those beyond a block's window, pixels around those of a
# chunk and a step
ODD = [
    (1, 160, 9, 16, 32),
    (2, 320, 3, 5, 32),
    (1, 640, 4, 4, 32),
    (2, 8, 1, 8, 2),
    (3, 24, 5, 8, 3),
    (1, 40, 16, 17, 8),
    (1, 1032, 2, 3, 3),
    (1, 2056, 1, 8, 2),
    (2, 300, 2, 3, 5),
    (1, 2, 96, 97, 1),
    (1, 4, 96, 96, 2),
    (2, 3, 0, 5, 3),
    (2, 1, 3, 3, 1),
]
CASES = list(dict.fromkeys([*SHAPES, *ODD]))
memory_formats = pytest.mark.parametrize("memory_format", FORMATS, ids=("contiguous", "channels_last"))


def example(
    size: list[int], dtype: torch.dtype, memory_format: torch.memory_format
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, grad = (torch.randn(size).to(dtype).to(memory_format=memory_format) for _ in range(2))
    weight, bias = torch.randn(2, size[1]).to(dtype)
    return x, weight, bias, grad


def all_of(gpu: Gpu, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, groups: int) -> list[Tensor]:
    """The output and the gradients, through the op."""
    leaves = [gpu(t).detach().requires_grad_() for t in (x, weight, bias)]
    y = native(leaves[0], leaves[1], leaves[2], groups)
    return [t.cpu() for t in (y.detach(), *torch.autograd.grad(y, leaves, gpu(grad)))]


def compare(
    results: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, groups: int
) -> None:
    given = (x, weight, bias)
    wide = [t.double() for t in (*given, grad)]
    owns = [torchs(*given, groups), *gradients(*given, grad, groups, torchs)]
    truths = [exact(*given, groups), *gradients(wide[0], wide[1], wide[2], wide[3], groups, exact)]
    for mine, own, truth in zip(results, owns, truths, strict=True):
        oracle.assert_as_good_as_torch(mine, own, truth)


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", oracle.LOW)
@memory_formats
def test_against_float64(
    gpu: Gpu, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    *size, groups = shape
    given = example(size, dtype, memory_format)
    results = all_of(gpu, *given, groups)
    for t in results[:2]:
        assert not t.numel() or t.is_contiguous(memory_format=memory_format)
    if math.prod(size) > size[0] * groups:  # groups of one element are normed to zero, and have no gradient
        compare(results, *given, groups)


@memory_formats
@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize(
    "shape", [*ADDED, (1, 160, 9, 16, 32), (1, 2056, 1, 8, 2), (1, 2, 96, 97, 1)], ids=str
)
def test_input_bias(
    gpu: Gpu, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    *size, groups = shape
    given = example_added(size, dtype, memory_format)
    leaves = [gpu(t).detach().requires_grad_() for t in given[:4]]
    y = native_added(*leaves, groups)
    assert not y.numel() or y.is_contiguous(memory_format=memory_format)
    grads = torch.autograd.grad(y, leaves, gpu(given[4]))
    compare_added([t.cpu() for t in (y.detach(), *grads)], given, groups)


@memory_formats
def test_a_large_input_bias_costs_no_precision(gpu: Gpu, memory_format: torch.memory_format) -> None:
    """Channels apart by 1000 times their spread, which the biases bring together; then biases that part them."""
    weight, bias, far = torch.ones(6), torch.zeros(6), torch.arange(6.0) * 1000 - 2000
    for x in (torch.randn(1, 6, 65, 63) - far[:, None, None], torch.randn(1, 6, 65, 63)):
        x = x.to(memory_format=memory_format)
        y = native_added(*map(gpu, (x, weight, bias, far)), 2).cpu()
        # x itself is rounded to 1e-4 where channels are apart
        torch.testing.assert_close(y.double(), exact_added(x, weight, bias, far, 2), rtol=2e-4, atol=2e-4)


@memory_formats
@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("off", range(-1, 4))
def test_any_place(gpu: Gpu, off: int, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """The kernels themselves, with each map in turn off the alignment, several chunks, parameters apart."""
    x, weight, bias, grad = example([2, 24, 5, 8], dtype, memory_format)
    weight, bias = torch.randn(2, 24).to(dtype).t().contiguous().t()
    maps = [x, grad, torch.empty_like(x), torch.empty_like(x)]

    def unaligned(t: Tensor) -> Tensor:
        place = torch.empty(t.numel() + 1, dtype=dtype)[1:]
        return place.as_strided(t.shape, t.stride()).copy_(t)

    places = [gpu(unaligned(t) if i == off else t) for i, t in enumerate(maps)]
    on_x, on_grad, y, grad_x = places
    on_weight, on_bias, grad_weight, grad_bias = map(
        gpu, (weight, bias, torch.empty(24).to(dtype), torch.empty(24).to(dtype))
    )
    stats, means, chunks = (gpu(torch.empty(size)) for size in ((2, 6, 2), (2, 6, 2), (2, 4, 24, 2)))
    run = kernels(on_x)
    given = view(on_x), view(on_weight), view(on_bias), None
    run.group_norm_silu(*given, *map(view, (y, stats, chunks)), 6, 1e-6)
    outputs = map(view, (grad_x, grad_weight, grad_bias, stats, means, chunks))
    run.group_norm_silu_backward(view(on_grad), *given, *outputs, 6, 1e-6)
    compare([t.cpu() for t in (y, grad_x, grad_weight, grad_bias)], x, weight, bias, grad, 6)


@memory_formats
def test_offsets_beyond_32_bits(gpu: Gpu, memory_format: torch.memory_format) -> None:
    """The last channel of the last image. Backward takes its offsets from the same places."""
    if gpu.level != "emulated":
        pytest.skip("spans 4 GB, of which the emulator touches a few pages")
    near, weight, bias, _ = example([1, 8, 8, 8], torch.bfloat16, memory_format)
    shape = (2**31 // near.numel() + 1, 8, 8, 8)
    x = torch.empty(shape, dtype=torch.bfloat16, memory_format=memory_format)
    x[-1] = near[0]
    with gpu.sampled(2):
        y = native(x, weight, bias, 8)
    assert torch.equal(y[-1, -1], native(near, weight, bias, 8)[0, -1])


@memory_formats
def test_chunks_fill_the_chip_once(gpu: Gpu, memory_format: torch.memory_format) -> None:
    """The last level of the decoder at 256 px: as many blocks as run at once, not many small ones."""
    x = torch.empty(1, 160, 256, 256, dtype=torch.bfloat16, device=gpu(torch.empty(0)).device)
    x = x.to(memory_format=memory_format)
    shares = 1 if memory_format == torch.channels_last else 160
    for backward in (False, True):
        scratch = _chunks(x, backward=backward)
        assert scratch is not None
        slots = multiprocessors(x) * (3 + (shares > 1) - backward)
        assert slots / 2 < scratch.shape[1] * shares <= slots


@memory_formats
def test_strides_that_need_a_copy(gpu: Gpu, memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 12, 9, 10)[:, ::2, 1:, ::3]  # (2, 6, 8, 4)
    weight, bias = torch.randn(2, 12)[:, ::2]
    other = FORMATS[1 - FORMATS.index(memory_format)]
    grad = torch.randn(x.shape)
    compare(all_of(gpu, x, weight, bias, grad, 3), x, weight, bias, grad, 3)
    x = x.contiguous(memory_format=memory_format)
    for grad in (torch.randn(x.shape).to(memory_format=other), torch.randn(2, 6, 1, 1).expand(x.shape)):
        compare(all_of(gpu, x, weight, bias, grad, 3), x, weight, bias, grad, 3)


@memory_formats
def test_a_large_mean_costs_no_precision(gpu: Gpu, memory_format: torch.memory_format) -> None:
    """A mean 1000 times the deviation, and first pixels unlike the rest."""
    weight, bias = torch.ones(4), torch.zeros(4)
    x = (torch.randn(1, 4, 65, 63) + 1000).to(memory_format=memory_format)
    y = ops.group_norm_silu(gpu(x), gpu(weight), gpu(bias), groups=2).cpu()
    torch.testing.assert_close(y.double(), exact(x, weight, bias, 2), rtol=1e-4, atol=1e-4)
    x = torch.randn(1, 4, 64, 64) + 100
    x[:, :, ::4, 0] = -1000
    x = x.to(memory_format=memory_format)
    y = ops.group_norm_silu(gpu(x), gpu(weight), gpu(bias), groups=2).cpu()
    torch.testing.assert_close(y.double(), exact(x, weight, bias, 2), rtol=1e-4, atol=1e-4)


@memory_formats
@pytest.mark.parametrize("special", [math.nan, math.inf])
@pytest.mark.parametrize("size", [(9, 5), (8, 4)])
def test_special_values_stay_in_their_group(
    gpu: Gpu, memory_format: torch.memory_format, special: float, size: tuple[int, int]
) -> None:
    x = torch.randn(2, 12, *size)
    x[0, 5, 4, 1] = special
    x = x.to(memory_format=memory_format)
    results = all_of(gpu, x, torch.ones(12), torch.zeros(12), torch.ones_like(x), 3)
    wanted = torch.zeros(2, 12, *size, dtype=torch.bool)
    wanted[0, 4:8] = True
    for mine in results[:2]:
        assert torch.equal(mine.isnan(), wanted)
    for mine in results[2:]:
        assert torch.equal(mine.isnan(), wanted.any(dim=0)[:, 0, 0])


@memory_formats
def test_slopes_far_from_zero(gpu: Gpu, memory_format: torch.memory_format) -> None:
    """Where SiLU is flat, or e^-y would overflow."""
    x, weight, bias, grad = example([1, 8, 4, 4], torch.float32, memory_format)
    bias = torch.tensor([-200.0, -90.0, -50.0, -10.0, 10.0, 50.0, 90.0, 200.0])
    results = all_of(gpu, x, weight, bias, grad, 2)
    compare(results, x, weight, bias, grad, 2)


@memory_formats
def test_eps(gpu: Gpu, memory_format: torch.memory_format) -> None:
    x, weight, bias, _ = example([1, 4, 3, 3], torch.float32, memory_format)
    y = ops.group_norm_silu(gpu(x * 1e-3), gpu(weight), gpu(bias), groups=2, eps=0.1).cpu()
    oracle.assert_equal_up_to_rounding(y, exact(x * 1e-3, weight, bias, 2, eps=0.1))


@memory_formats
@pytest.mark.parametrize("channels", [40, 6])
def test_the_order_of_threads_changes_no_bit(
    gpu: Gpu, memory_format: torch.memory_format, channels: int
) -> None:
    given = example([2, channels, 15, 14], torch.float32, memory_format)
    runs = []
    for seed in range(3):
        if gpu.level == "emulated":
            emulation.emulator().seed(seed)
        runs.append(all_of(gpu, *given, 2))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@memory_formats
@pytest.mark.parametrize("channels", [40, 64, 6])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_no_bank_conflicts(
    traced: Gpu, memory_format: torch.memory_format, channels: int, dtype: torch.dtype
) -> None:
    all_of(traced, *example([1, channels, 8, 8], dtype, memory_format), 2)
    assert traced.conflicts() == []


def test_the_kernel_refuses(gpu: Gpu) -> None:
    x, four = gpu(torch.zeros(1, 4, 2, 2)), gpu(torch.zeros(4))
    pairs, chunks = gpu(torch.zeros(1, 2, 2)), gpu(torch.zeros(1, 1, 4, 2))

    def forward(stats: Tensor | None, scratch: Tensor | None) -> None:
        given = view(x), view(four), view(four), None, view(torch.empty_like(x))
        kernels(x).group_norm_silu(*given, maybe_view(stats), maybe_view(scratch), 2, 1e-6)

    def backward(stats: Tensor | None, means: Tensor | None, scratch: Tensor | None) -> None:
        outputs = map(view, (torch.empty_like(x), four, four))
        given = view(x), view(x), view(four), view(four), None, *outputs
        kernels(x).group_norm_silu_backward(
            *given, maybe_view(stats), maybe_view(means), maybe_view(scratch), 2, 1e-6
        )

    for stats, scratch, message in (
        (None, chunks, r"stats must have shape \(B, groups, 2\) on CUDA, got none"),
        (pairs, None, r"scratch must have shape \(B, P, C, 2\) on CUDA, got none"),
        (chunks[0, 0], chunks, r"stats must have shape \(1, 2, 2\), got \(4, 2\)"),
        (pairs, pairs, r"scratch must have shape \(1, P, 4, 2\), got \(1, 2, 2\)"),
    ):
        with pytest.raises(ValueError, match=f"^group_norm_silu: {message}"):
            forward(stats, scratch)
        with pytest.raises(ValueError, match=f"^group_norm_silu_backward: {message}"):
            backward(stats, pairs, scratch)
    with pytest.raises(ValueError, match=r"means must have shape \(B, groups, 2\) on CUDA, got none"):
        backward(pairs, None, chunks)
    flat = (4 * 2**31, 2**31, 2**16, 1)
    wide = _C.TensorView(x.data_ptr(), (1, 4, 2**15, 2**16), flat, _C.DType.float32)
    with pytest.raises(ValueError, match=r"elements of a chunk must be below 2\^31 on CUDA, got 2147483648"):
        kernels(x).group_norm_silu(
            wide, view(four), view(four), None, wide, view(pairs), view(chunks), 2, 1e-6
        )
