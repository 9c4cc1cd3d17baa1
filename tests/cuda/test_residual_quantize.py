from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.ops import oracle
from tests.ops.test_residual_quantize import SCHEDULES, Given, exact, inputs
from var_ext import _C, ops, reference
from var_ext.ops._native import kernels, maybe_view, view

# sides, batch, channels, codes: the published schedule in small; odd channels; grids of several tiles; one code, few,
# many
CASES = [
    *((sides, 2, 4, 37) for sides in SCHEDULES),
    ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 1, 32, 300),
    ((1, 2, 5), 2, 8, 1),
    ((2, 3), 3, 24, 5),
    ((1, 3, 7), 1, 40, 4096),
    ((1, 2, 4), 2, 33, 151),
    ((1, 5, 17), 1, 8, 64),
    ((3, 20, 33), 1, 4, 16),
    ((1, 2), 140, 12, 20),
]


def moved(gpu: Gpu, given: Given) -> Given:
    return Given(*(gpu(t) for t in given[:4]), *given[4:])


def on_cpu(given: Given, cosine: bool) -> list[Tensor]:
    """The CPU kernel's tokens, f_hat and scales."""
    batch, sides = given.features.shape[0], given.schedule.patch_nums
    tokens = torch.empty(batch, given.schedule.num_tokens, dtype=torch.int64)
    f_hat = torch.empty(given.features.shape)
    scales = torch.empty(len(sides), *f_hat.shape)
    results = [tokens, f_hat, scales]
    _C.residual_quantize(
        *map(view, given[:4]), given.phi_index, sides, 0.5, cosine, *map(view, results), None
    )
    return results


@pytest.mark.parametrize(("sides", "batch", "channels", "codes"), CASES)
@pytest.mark.parametrize("cosine", [False, True])
def test_the_bits_of_the_cpu(
    gpu: Gpu, sides: tuple[int, ...], batch: int, channels: int, codes: int, cosine: bool
) -> None:
    """Tokens and f_hat after each scale, where the CPU has FMA as GPUs have."""
    given = inputs(sides, batch=batch, channels=channels, codes=codes)
    given.phi_weight.mul_(2 * channels**-0.5)
    placed = moved(gpu, given)
    tokens, f_hat, scales = ops.residual_quantize(*placed, cosine=cosine, per_scale=True)
    assert scales is not None
    if _C.isa() != "portable":
        for mine, cpus in zip((tokens, f_hat, scales), on_cpu(given, cosine), strict=True):
            assert torch.equal(mine.cpu(), cpus)
    again, same, nothing = ops.residual_quantize(*placed, cosine=cosine)
    assert nothing is None
    assert torch.equal(again, tokens)
    assert torch.equal(same, f_hat)


def test_a_filter_before_the_search(gpu: Gpu) -> None:
    """At the second scale, with the codes that the first has packed."""
    given = inputs((1, 4), batch=33, channels=17, codes=16000)
    sizes = (33, 16000, 17), (33 * 16, 16000, 17)
    assert [_C.nearest_code_scratch(*s) == _C.nearest_code_scratch(*s, filter=True) for s in sizes] == [
        False,
        True,
    ]
    tokens, f_hat, _ = ops.residual_quantize(*moved(gpu, given))
    if _C.isa() != "portable":
        for mine, cpus in zip((tokens, f_hat), on_cpu(given, False), strict=False):
            assert torch.equal(mine.cpu(), cpus)


@pytest.mark.parametrize("sides", SCHEDULES)
@pytest.mark.parametrize("cosine", [False, True])
def test_against_float64(gpu: Gpu, sides: tuple[int, ...], cosine: bool) -> None:
    given = inputs(sides)
    tokens, f_hat, scales = ops.residual_quantize(
        *moved(gpu, given), ratio=0.25, cosine=cosine, per_scale=True
    )
    true_tokens, true_scales = exact(given, 0.25, cosine)
    assert torch.equal(tokens.cpu(), true_tokens)
    assert scales is not None
    oracle.assert_equal_up_to_rounding(scales.cpu(), true_scales)
    oracle.assert_equal_up_to_rounding(f_hat.cpu(), true_scales[-1])


@pytest.mark.parametrize(("sides", "batch", "channels", "codes"), [
    ((1, 2, 3), 2, 4, 37),
    ((1,), 3, 1, 2),
    ((2, 3, 16), 1, 32, 151),
    ((1, 1, 1, 2), 1, 33, 40),
    ((1, 5, 17), 1, 8, 3),
    ((2, 9), 2, 24, 1),
])  # fmt: skip
def test_gradients(gpu: Gpu, sides: tuple[int, ...], batch: int, channels: int, codes: int) -> None:
    """Of codebook and phi, with a convolution that several scales take and one that none does."""
    given = inputs(sides, batch=batch, channels=channels, codes=codes, phis=3)
    given.phi_weight.mul_(2 * channels**-0.5)
    given = given._replace(phi_index=[2 * (k % 2) for k in range(len(sides))])
    placed = moved(gpu, given)
    leaves = [t.requires_grad_() for t in placed[1:4]]
    tokens, _, scales = ops.residual_quantize(*placed, per_scale=True)
    assert scales is not None
    push = torch.randn(scales.shape)
    grads = torch.autograd.grad(scales, leaves, gpu(push))
    plain = [t.detach().cpu().requires_grad_() for t in given[1:4]]
    truth_of = given._replace(codebook=plain[0], phi_weight=plain[1], phi_bias=plain[2])
    truths = torch.autograd.grad((exact(truth_of, tokens=tokens.cpu())[1] * push).sum(), plain)
    for grad, truth in zip(grads, truths, strict=True):
        torch.testing.assert_close(grad.cpu(), truth, rtol=1e-4, atol=2e-5 * truth.abs().max().item())
    assert not grads[1][1].any()
    assert not grads[2][1].any()


def test_strided_views(gpu: Gpu) -> None:
    given = inputs((1, 2, 4))
    views = given._replace(
        features=torch.randn(2, 5, 4, 4).permute(0, 2, 3, 1)[..., :4],
        codebook=torch.randn(4, 37).T,
        phi_weight=torch.randn(4, 4, 4, 3, 3)[::2],
    )
    tokens, f_hat, _ = ops.residual_quantize(*moved(gpu, views))
    plain = views._replace(**{name: getattr(views, name).contiguous() for name in views._fields[:4]})
    for mine, same in zip((tokens, f_hat), ops.residual_quantize(*moved(gpu, plain)), strict=False):
        assert torch.equal(mine, same)
    assert torch.equal(tokens.cpu(), exact(views)[0])


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(gpu: Gpu, batch: int) -> None:
    given = moved(gpu, inputs((1, 2, 3), batch=batch))
    leaves = [t.requires_grad_() for t in given[1:4]]
    tokens, f_hat, scales = ops.residual_quantize(*given, per_scale=True)
    assert scales is not None
    assert (tokens.shape, f_hat.shape, scales.shape) == ((batch, 14), (batch, 4, 3, 3), (3, batch, 4, 3, 3))
    grads = torch.autograd.grad(scales.sum(), leaves, allow_unused=True)
    assert all(grad is None if batch == 0 else grad.isfinite().all() for grad in grads)
    empty = torch.ops.var_ext.residual_quantize_backward(
        scales[:, :0].detach(), tokens[:0], given.codebook, given.phi_weight, given.phi_index, [1, 2, 3], 0.5
    )
    assert not any(grad.any() for grad in empty)


def test_an_image_does_not_depend_on_its_batch(gpu: Gpu) -> None:
    given = moved(gpu, inputs((1, 2, 5), batch=5))
    together = ops.residual_quantize(*given)
    for i in range(5):
        alone = ops.residual_quantize(given.features[i : i + 1], *given[1:])
        assert torch.equal(alone[0], together[0][i : i + 1])
        assert torch.equal(alone[1], together[1][i : i + 1])


def test_features_that_are_not_numbers(gpu: Gpu) -> None:
    given = inputs((1, 3))
    given.features[0, 2, 1, 1] = float("nan")
    given.features[1, 1, 0, 2] = float("inf")
    tokens, f_hat, _ = ops.residual_quantize(*moved(gpu, given))
    expected = reference.residual_quantize(*given)
    assert torch.equal(tokens.cpu(), expected[0])
    assert torch.equal(f_hat.cpu().isnan(), expected[1].isnan())


def test_ties_go_to_the_lowest_index(gpu: Gpu) -> None:
    given = moved(gpu, inputs((1, 2, 5), codes=8))
    often = given._replace(codebook=given.codebook.repeat(40, 1))
    assert torch.equal(ops.residual_quantize(*given)[0], ops.residual_quantize(*often)[0])


def test_the_order_of_threads_changes_no_bit(gpu: Gpu) -> None:
    runs = []
    given = inputs((1, 2, 5, 9), batch=2, channels=12, codes=70)
    push = torch.randn(4, 2, 12, 9, 9)
    for seed in range(2):
        if gpu.level == "emulated":
            emulation.emulator().seed(seed)
        placed = moved(gpu, given)
        leaves = [t.requires_grad_() for t in placed[1:4]]
        tokens, f_hat, scales = ops.residual_quantize(*placed, per_scale=True)
        runs.append([tokens, f_hat, scales, *torch.autograd.grad(scales, leaves, gpu(push))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_tokens_out_of_range_touch_nothing_else(gpu: Gpu) -> None:
    """The host does not read them: they count as the first and the last code."""
    given = inputs((1, 2), codes=40)
    tokens = torch.tensor([[40, 0, -1, 2**40, 39], [1, 2, 3, 4, 5]])
    push = torch.randn(2, 2, 4, 2, 2)

    def backward(index: Tensor) -> Any:
        return torch.ops.var_ext.residual_quantize_backward(
            gpu(push), gpu(index), gpu(given.codebook), gpu(given.phi_weight), [0, 1], [1, 2], 0.5
        )

    for mine, same in zip(backward(tokens), backward(tokens.clamp(0, 39)), strict=True):
        assert torch.equal(mine, same)


def test_no_bank_conflicts(traced: Gpu) -> None:
    """But for the windows of the next scale, of which there is none here, and planes narrower than eight pixels."""
    given = moved(traced, inputs((8,), channels=32, codes=200))
    leaves = [t.requires_grad_() for t in given[1:4]]
    scales = ops.residual_quantize(*given, per_scale=True)[2]
    assert traced.conflicts() == []
    assert scales is not None
    torch.autograd.grad(scales.sum(), leaves)


def test_launches(gpu: Gpu) -> None:
    """As benchmarks/bench_residual_quantize.py counts them."""
    if gpu.level != "emulated":
        pytest.skip("the emulator counts launches")
    given = inputs((1, 2, 4))
    leaves = [t.requires_grad_() for t in given[1:4]]
    before = emulation.emulator().launches()
    scales = ops.residual_quantize(*given, per_scale=True)[2]
    assert emulation.emulator().launches() - before == 2 + 4 * 3
    assert scales is not None
    torch.autograd.grad(scales.sum(), leaves)
    assert emulation.emulator().launches() - before == 2 + 4 * 3 + 5 * 3


def test_the_kernel_refuses(gpu: Gpu) -> None:
    given = moved(gpu, inputs((1, 2)))
    tokens, f_hat = gpu(torch.zeros(2, 5, dtype=torch.int64)), gpu(torch.empty(2, 4, 2, 2))
    size = _C.residual_quantize_scratch(2, 4, 37, [1, 2])
    run = kernels(f_hat)
    for memory, message in (
        (None, rf"scratch must have shape \({size},\) on CUDA, got none"),
        (gpu(torch.zeros(size - 1)), rf"scratch must have shape \({size},\), got \({size - 1},\)"),
    ):
        with pytest.raises(ValueError, match=f"residual_quantize: {message}"):
            run.residual_quantize(
                *map(view, given[:4]), [0, 1], [1, 2], 0.5, False, view(tokens), view(f_hat), None,
                maybe_view(memory),
            )  # fmt: skip
    size = _C.residual_quantize_backward_scratch(2, 4, [1, 2])
    grads = [torch.empty_like(t) for t in given[1:4]]
    with pytest.raises(ValueError, match=rf"residual_quantize_backward: scratch must have shape \({size},\)"):
        run.residual_quantize_backward(
            view(gpu(torch.zeros(2, 2, 4, 2, 2))), view(tokens), view(given.codebook), view(given.phi_weight),
            [0, 1], [1, 2], 0.5, *map(view, grads), None,
        )  # fmt: skip
