from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.ops import oracle
from tests.ops.test_adaln import LAYOUTS, NATIVE, SHAPES, exact, inputs, native, torchs
from var_ext import _C, ops
from var_ext.ops._native import kernels, maybe_view, view

# Channels of d16, d30, d36, of a warp and less, of no whole number of 16 bytes, beyond what a block holds; rows around
# those of a chunk
ODD = [
    (1, 5, 1024),
    (2, 3, 1920),
    (1, 9, 2304),
    (1, 3, 2560),
    (2, 3, 2568),
    (3, 7, 8),
    (2, 17, 24),
    (1, 33, 40),
    (2, 9, 50),
    (1, 4, 1000),
]
CASES = list(dict.fromkeys([*ODD, *NATIVE, *SHAPES]))


def alone(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torchs(x, scale, shift, x, scale * 0)[1]


def all_of(gpu: Gpu, given: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients through the op; with a residual where `given` has five tensors."""
    function = native if len(given) == 5 else ops.adaln
    leaves = [gpu(t).detach().requires_grad_() for t in given]
    outputs: Any = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(t.is_contiguous() for t in outputs)
    back = torch.autograd.grad(outputs, leaves, [gpu(t) for t in grads])
    return [t.detach().cpu() for t in (*outputs, *back)]


def wanted(given: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """What torch makes of it in the dtype of its arguments."""
    plain = torchs if len(given) == 5 else alone
    outputs: Any = plain(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *oracle.gradients(plain, given, grads)]


def compare(results: list[Tensor], given: list[Tensor], grads: list[Tensor]) -> None:
    truths = wanted([t.double() for t in given], [t.double() for t in grads])
    outputs = 2 if len(given) == 5 else 1
    for i, (mine, own, truth) in enumerate(zip(results, wanted(given, grads), truths, strict=True)):
        # a row of one channel has a gradient of zero, up to the rounding of 1 / sqrt(eps) = 1000
        if i < outputs or given[0].shape[2] > 1:
            oracle.assert_as_good_as_torch(mine, own, truth)


def example(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, residual: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    given = list(inputs(shape, dtype).values())
    grads = [torch.randn(shape).to(dtype) for _ in range(2)]
    return (given, grads) if residual else (given[:3], grads[1:])


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("residual", [True, False])
def test_against_float64(gpu: Gpu, shape: tuple[int, int, int], dtype: torch.dtype, residual: bool) -> None:
    """Forward and gradients, as near to float64 as torch is."""
    given, grads = example(shape, dtype, residual)
    compare(all_of(gpu, given, grads), given, grads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [20, 40])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_layouts(gpu: Gpu, layout: str, channels: int, dtype: torch.dtype) -> None:
    """What a layout holds decides the result, to the bit."""
    given, grads = example((2, 5, channels), dtype)
    placed, placed_grads = [LAYOUTS[layout](t) for t in given], [LAYOUTS[layout](t) for t in grads]
    plain, plain_grads = [t.contiguous() for t in placed], [t.contiguous() for t in placed_grads]
    results = all_of(gpu, placed, placed_grads)
    for mine, want in zip(results, all_of(gpu, plain, plain_grads), strict=True):
        assert torch.equal(mine, want)


@pytest.mark.parametrize("off", range(-1, 13))
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_any_place(gpu: Gpu, off: int, dtype: torch.dtype) -> None:
    """The kernels themselves, with each tensor in turn off the alignment or its rows apart."""
    given, grads = example((2, 9, 40), dtype)
    x, scale, shift, branch, gate = given
    h, y, grad_x, grad_branch = (torch.empty_like(x) for _ in range(4))
    places = [x, scale, shift, branch, gate, h, y, *grads, grad_x, grad_branch, x, branch]
    moved = [gpu(oracle.unaligned(t) if i == off and i < 11 else t) for i, t in enumerate(places)]
    x, scale, shift, branch, gate, h, y, grad_h, grad_y, grad_x, grad_branch = moved[:11]
    if off == 11:
        x = F.pad(x, (0, 3))[..., :40]
    if off == 12:
        branch = F.pad(branch, (0, 8))[..., :40]
    vectors = [gpu(torch.empty_like(given[1])) for _ in range(3)]
    sums = gpu(torch.empty(2, 3, 3, 40))
    run = kernels(x)
    run.adaln(*map(view, (x, scale, shift, branch, gate, h, y)), 1e-6)
    run.adaln_backward(
        *map(view, (grad_y, x, scale, grad_h, branch, gate, grad_x, vectors[0], vectors[1], grad_branch, vectors[2])),
        view(sums), 1e-6,
    )  # fmt: skip
    results = [h, y, grad_x, vectors[0], vectors[1], grad_branch, vectors[2]]
    compare([t.cpu() for t in results], given, grads)


@pytest.mark.parametrize("shape", [(1, 5001, 8), (5000, 1, 8), (4300, 1, 5)], ids=str)
def test_large_counts(gpu: Gpu, shape: tuple[int, int, int]) -> None:
    """So many rows that a block takes several, and samples without number; grids have one axis, which holds 2^31."""
    given, grads = example(shape)
    results = all_of(gpu, given, grads)
    truths = wanted([t.double() for t in given], [t.double() for t in grads])
    # rows of few channels may be nearly constant: the slope is up to 1000, and rounding with it
    for mine, truth in zip(results, truths, strict=True):
        torch.testing.assert_close(
            mine.double(), truth, rtol=1e-3, atol=1e-4 * max(1, truth.abs().max().item())
        )


@pytest.mark.parametrize("channels", [8, 5])
def test_offsets_beyond_32_bits(gpu: Gpu, channels: int) -> None:
    if gpu.level != "emulated":
        pytest.skip("spans 30 GB, of which the emulator touches a few pages")
    far = 2**31

    def spread(x: Tensor) -> Tensor:
        place = torch.empty(far + x[0].numel(), dtype=x.dtype)
        return place.as_strided(x.shape, (far, *x.stride()[1:])).copy_(x)

    given, grads = example((2, 3, channels), torch.bfloat16)
    results = all_of(gpu, [spread(t) for t in given], [spread(t) for t in grads])
    for mine, want in zip(results, all_of(gpu, given, grads), strict=True):
        assert torch.equal(mine, want)


@pytest.mark.parametrize("channels", [512, 50])
def test_a_large_mean_costs_no_precision(gpu: Gpu, channels: int) -> None:
    x, vector = 1e4 + torch.randn(1, 4, channels), torch.zeros(1, channels)
    y = ops.adaln(gpu(x), gpu(vector), gpu(vector)).cpu()
    # the mean's own rounding is as large as that of x, which is given
    torch.testing.assert_close(y.double(), exact(x, vector, vector), rtol=0, atol=2e-3)


@pytest.mark.parametrize("channels", [40, 33])
def test_nan_and_infinity_stay_in_their_row(gpu: Gpu, channels: int) -> None:
    given, grads = example((1, 5, channels))
    given[0][0, 1, 3], given[0][0, 2, channels - 1] = math.nan, math.inf
    results, truths = all_of(gpu, given, grads), wanted(given, grads)
    for i in (0, 1, 2, 5):
        torch.testing.assert_close(results[i], truths[i], equal_nan=True, rtol=1e-4, atol=1e-4)


def test_eps(gpu: Gpu) -> None:
    for channels in (8, 9):
        given = inputs((1, 2, channels))
        x, scale, shift = given["x"] * 1e-3, given["scale"], given["shift"]
        y = ops.adaln(gpu(x), gpu(scale), gpu(shift), eps=0.1).cpu()
        oracle.assert_equal_up_to_rounding(y, exact(x, scale, shift, eps=0.1))


@pytest.mark.parametrize("channels", [50, 264])
def test_the_order_of_threads_changes_no_bit(gpu: Gpu, channels: int) -> None:
    runs = []
    given, grads = example((2, 30, channels))
    for seed in range(3):
        if gpu.level == "emulated":
            emulation.emulator().seed(seed)
        runs.append(all_of(gpu, given, grads))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("channels", [50, 264])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_no_bank_conflicts(traced: Gpu, channels: int, dtype: torch.dtype) -> None:
    all_of(traced, *example((1, 9, channels), dtype))
    assert traced.conflicts() == []


def test_the_kernel_refuses(gpu: Gpu) -> None:
    x, vector = gpu(torch.zeros(2, 3, 8)), gpu(torch.zeros(2, 8))

    def backward_with(sums: Tensor | None) -> None:
        outputs = [view(torch.empty_like(t)) for t in (x, vector, vector)]
        kernels(x).adaln_backward(
            view(x), view(x), view(vector), None, None, None, *outputs, None, None, maybe_view(sums), 1e-6
        )

    with pytest.raises(
        ValueError, match=r"adaln: scratch must have shape \(B, P, vectors, C\) on CUDA, got none"
    ):
        backward_with(None)
    with pytest.raises(ValueError, match=r"scratch must have shape \(2, P, 2, 8\), got \(2, 1, 3, 8\)"):
        backward_with(gpu(torch.zeros(2, 1, 3, 8)))
    many = 2**31
    rows = _C.TensorView(x.data_ptr(), (1, many, 1), (0, 0, 1), _C.DType.float32)
    out = _C.TensorView(x.data_ptr(), (1, many, 1), (many, 1, 1), _C.DType.float32)
    one = view(vector[:1, :1])
    with pytest.raises(ValueError, match=r"adaln: B \* L must be below 2\^31 on CUDA, got 2147483648"):
        kernels(x).adaln(rows, one, one, None, None, None, out, 1e-6)
