from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.ops import oracle
from tests.ops.test_residual_step import SIZES, channels_last, exact, inputs
from var_ext import _C, ops, reference
from var_ext.ops._native import kernels, maybe_view, view

# batch, channels, f_hat, codes, next: the published shapes; odd channels; images of several tiles, in both directions;
# batches that let a block take 8, 16 and 32 output channels
CASES = [
    *SIZES,
    (2, 32, (16, 16), (13, 13), 16),
    (1, 32, (16, 16), (16, 16), None),
    (1, 8, (9, 5), (2, 4), (3, 5)),
    (2, 24, (5, 9), (5, 2), (2, 1)),
    (1, 40, (7, 7), (3, 3), 4),
    (1, 33, (7, 3), (7, 3), 2),
    (1, 8, (48, 48), (5, 5), 7),
    (1, 5, (3, 300), (2, 31), (2, 20)),
    (1, 4, (33, 17), (8, 9), None),
    (70, 12, (3, 2), (2, 2), 2),
    (132, 12, (2, 3), (1, 2), 2),
    pytest.param(132, 20, (1, 2), (1, 1), 1, marks=pytest.mark.slow),
]
GRADIENTS = [
    (2, 4, (16, 16), (1, 1), 2),
    (2, 5, (7, 5), (3, 2), (4, 3)),
    (1, 32, (16, 16), (13, 13), None),
    (3, 1, (1, 9), (1, 4), (1, 1)),
    (1, 40, (7, 7), (3, 3), None),
    (1, 8, (24, 20), (24, 20), None),
    (1, 4, (33, 17), (8, 9), None),
    (2, 24, (5, 9), (5, 2), None),
]


def small_weights(given: list[Tensor]) -> list[Tensor]:
    """So that sums over all channels stay of order one."""
    given[2] = given[2] * (9 * given[2].shape[0]) ** -0.5
    return given


def on_cpu(given: list[Tensor], next_size: Any, ratio: float) -> list[Tensor]:
    """The CPU kernel's results."""
    f_hat, embedding, weight, bias = given
    new = torch.empty(f_hat.shape)
    pooled = None
    if next_size is not None:
        size = (next_size, next_size) if isinstance(next_size, int) else next_size
        pooled = torch.empty(*f_hat.shape[:2], *size)
    _C.residual_step(
        view(f_hat), view(embedding), view(weight), view(bias), ratio, view(new), maybe_view(pooled)
    )
    return [new, new if pooled is None else pooled]


@pytest.mark.parametrize(("batch", "channels", "size", "codes", "following"), CASES)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
def test_the_bits_of_the_cpu(
    gpu: Gpu, batch: int, channels: int, size: Any, codes: Any, following: Any, layout: Any
) -> None:
    """As near to float64 as rounding allows; and where the CPU has FMA, as GPUs do, the same bits."""
    given = small_weights(inputs(batch, channels, size, codes))
    given[1] = layout(given[1])
    results = ops.residual_step(*map(gpu, given), next_size=following, ratio=0.3)
    for mine, truth in zip(results, exact(*given, following, 0.3), strict=True):
        assert mine.shape == truth.shape
        oracle.assert_equal_up_to_rounding(mine.cpu(), truth)
    if _C.isa() != "portable" and gpu.level == "emulated":
        for mine, cpus in zip(results, on_cpu(given, following, 0.3), strict=True):
            assert torch.equal(mine, cpus)


@pytest.mark.parametrize("ratio", [0.5, 0.0, -0.25, 1.0])
def test_ratios(gpu: Gpu, ratio: float) -> None:
    given = inputs(1, 4, (6, 5), (2, 3))
    results = ops.residual_step(*map(gpu, given), next_size=(2, 5), ratio=ratio)
    for mine, truth in zip(results, exact(*given, (2, 5), ratio), strict=True):
        oracle.assert_equal_up_to_rounding(mine.cpu(), truth)


@pytest.mark.parametrize(("batch", "channels", "size", "codes", "following"), GRADIENTS)
def test_gradients(gpu: Gpu, batch: int, channels: int, size: Any, codes: Any, following: Any) -> None:
    given = small_weights(inputs(batch, channels, size, codes))
    following = None  # its gradient is area_downsample's
    push = torch.randn(batch, channels, *size)

    def step(*tensors: Tensor) -> Tensor:
        return ops.residual_step(*tensors, next_size=following, ratio=0.3)[0]

    grads = oracle.gradients(step, [gpu(t) for t in given], [gpu(push)])
    torchs = oracle.gradients(
        lambda *t: reference.residual_step(*t, next_size=following, ratio=0.3)[0], given, [push]
    )
    truths = oracle.gradients(
        lambda *t: exact(*t, following, 0.3)[0], [t.double() for t in given], [push.double()]
    )
    for grad, torchs_own, truth in zip(grads, torchs, truths, strict=True):
        # half a unit for each of the few roundings on the way, where torch happens to have fewer
        error = (grad.cpu().double() - truth).abs().max()
        allowed = 2 * (torchs_own.double() - truth).abs().max() + 2e-7 * truth.abs().max()
        assert error <= allowed, (grad.shape, error, allowed)


def test_a_chip_with_less_shared_memory(gpu: Gpu) -> None:
    """Tiles that others take, of 107 KB forward and backward, would be refused."""
    with gpu.of_chip("86"):
        test_the_bits_of_the_cpu(gpu, 1, 72, (16, 16), (3, 3), 5, torch.Tensor.contiguous)
    given, push = small_weights(inputs(1, 160, (8, 8), (8, 8))), torch.randn(1, 160, 8, 8)
    grads = {}
    for chip in ("80", "86"):
        with gpu.of_chip(chip):
            leaves = [gpu(t).detach().requires_grad_() for t in given]
            grads[chip] = torch.autograd.grad(ops.residual_step(*leaves, ratio=0.3)[0], leaves, gpu(push))
    for mine, other in zip(grads["86"], grads["80"], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_only_the_gradients_that_are_wanted(gpu: Gpu) -> None:
    full = [gpu(t).requires_grad_() for t in inputs(2, 3, (5, 4), (2, 2))]
    push = gpu(torch.randn(2, 3, 5, 4))
    all_four = torch.autograd.grad(ops.residual_step(*full)[0], full, push)
    for i in range(4):
        some = [t.detach().requires_grad_(i == j) for j, t in enumerate(full)]
        (grad,) = torch.autograd.grad(ops.residual_step(*some)[0], some[i], push)
        assert torch.equal(grad, all_four[i])
    _, embedding, weight, _ = (t.detach() for t in full)
    memory = gpu(torch.empty(_C.residual_step_scratch(2, 3, 5, 4)))
    for i, like in ((0, weight), (1, full[3].detach())):
        alone = torch.empty_like(like)
        targets = [None, *(view(alone) if i == j else None for j in range(2))]
        kernels(alone).residual_step_backward(
            view(push), view(embedding), view(weight), 0.5, *targets, view(memory)
        )
        assert torch.equal(alone, all_four[2 + i])


def test_strided_and_unaligned_views(gpu: Gpu) -> None:
    f_hat, embedding = torch.randn(2, 6, 7, 4).permute(0, 3, 1, 2), torch.randn(2, 8, 3, 6)[:, ::2, :, 1:4]
    weight, bias = torch.randn(3, 3, 4, 4).permute(2, 3, 0, 1), torch.randn(8)[::2]
    given = [f_hat, embedding, weight, bias]
    results = ops.residual_step(*map(gpu, given), next_size=(2, 3))
    for mine, truth in zip(results, exact(*given, (2, 3), 0.5), strict=True):
        oracle.assert_equal_up_to_rounding(mine.cpu(), truth)
    push = torch.randn(2, 6, 7, 4).permute(0, 3, 1, 2)
    grads = torch.autograd.grad(
        ops.residual_step(*(leaves := [gpu(t).requires_grad_() for t in given]))[0], leaves, gpu(push)
    )
    plain = [gpu(t.contiguous()).requires_grad_() for t in given]
    for grad, same in zip(
        grads, torch.autograd.grad(ops.residual_step(*plain)[0], plain, gpu(push.contiguous())), strict=True
    ):
        assert torch.equal(grad, same)
    shifted = [oracle.unaligned(t.contiguous()) for t in given]
    torch.testing.assert_close(
        ops.residual_step(*map(gpu, shifted))[0].cpu(), results[0].cpu(), rtol=1e-5, atol=1e-5
    )


def test_nan_stays_where_it_is_used(gpu: Gpu) -> None:
    f_hat, embedding, weight, bias = inputs(1, 20, (9, 9), (9, 9))
    embedding[0, 3, 4, 4] = float("nan")
    f_hat[0, 5, 0, 8] = float("inf")
    new, _ = ops.residual_step(*map(gpu, (f_hat, embedding, weight, bias)))
    expected = reference.residual_step(f_hat, embedding, weight, bias)[0]
    assert torch.equal(new.cpu().isnan(), expected.isnan())
    assert torch.equal(new.cpu().isinf(), expected.isinf())


def test_the_order_of_threads_changes_no_bit(gpu: Gpu) -> None:
    given, push = inputs(2, 12, (16, 17), (5, 5)), torch.randn(2, 12, 16, 17)
    runs = []
    for seed in range(2):
        if gpu.level == "emulated":
            emulation.emulator().seed(seed)
        leaves = [gpu(t).requires_grad_() for t in given]
        new, pooled = ops.residual_step(*leaves, next_size=7)
        runs.append([new, pooled, *torch.autograd.grad(new, leaves, gpu(push))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("batch", "channels"), [(1, 8), (1, 40), (66, 12), pytest.param(67, 24, marks=pytest.mark.slow)]
)
def test_no_bank_conflicts(traced: Gpu, batch: int, channels: int) -> None:
    """But for the windows of the next scale, which lie as they lie, and the weights of backward: see there."""
    given = inputs(batch, channels, (1, 8) if batch > 1 else (16, 16), (1, 8) if batch > 1 else (3, 3))
    ops.residual_step(*map(traced, given))
    assert traced.conflicts() == []


def test_launches(gpu: Gpu) -> None:
    """As benchmarks/bench_residual_step.py counts them."""
    if gpu.level != "emulated":
        pytest.skip("the emulator counts launches")
    counts = []
    for side, codes, following in ((16, 3, 5), (17, 3, 5), (16, 3, None), (16, 16, None)):
        given = [t.requires_grad_() for t in inputs(1, 4, (side, side), (codes, codes))]
        before = emulation.emulator().launches()
        new, _ = ops.residual_step(*given, next_size=following)
        counts.append(emulation.emulator().launches() - before)
        if following is None:
            torch.autograd.grad(new.sum(), given)
            counts.append(emulation.emulator().launches() - before - counts[-1])
    assert counts == [1, 2, 1, 4, 1, 3]


def test_the_kernel_refuses(gpu: Gpu) -> None:
    f_hat, embedding, weight, bias = (gpu(t) for t in inputs(1, 4, (6, 6), (2, 2)))
    size = _C.residual_step_scratch(1, 4, 6, 6)
    for memory, message in (
        (None, rf"scratch must have shape \({size},\) on CUDA, got none"),
        (gpu(torch.zeros(size + 1)), rf"scratch must have shape \({size},\), got \({size + 1},\)"),
    ):
        with pytest.raises(ValueError, match=f"residual_step_backward: {message}"):
            kernels(f_hat).residual_step_backward(
                view(f_hat), view(embedding), view(weight), 0.5, None, None, view(bias), maybe_view(memory)
            )
    wide = _C.TensorView(f_hat.data_ptr(), (1, 1, 1, 16385), (0, 0, 0, 0), _C.DType.float32)
    out = _C.TensorView(f_hat.data_ptr(), (1, 1, 1, 16385), (16385, 16385, 16385, 1), _C.DType.float32)
    phi = view(weight.flatten()[:9].view(1, 1, 3, 3)), view(bias[:1])
    with pytest.raises(ValueError, match="residual_step: sides must be at most 16384 on CUDA, got 16385"):
        kernels(f_hat).residual_step(wide, view(f_hat[:, :1]), *phi, 0.5, out, None)
    many = 1000
    tensors = (torch.zeros(1, many, 1, 1), torch.zeros(1, many, 1, 1), torch.zeros(many, many, 3, 3))
    with pytest.raises(
        ValueError, match=r"residual_step: C must be small enough .* got 1000; VAR_EXT_BACKEND"
    ):
        ops.residual_step(*map(gpu, tensors), gpu(torch.zeros(many)))
