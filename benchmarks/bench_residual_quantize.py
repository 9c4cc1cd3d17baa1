"""residual_quantize: features of 256 px images to tokens, with the published codebook's size; and its gradients.

On CUDA four launches a scale and two in front: 42 for ten scales. One launch instead, of an image a block, would have
each multiprocessor search the codebook for an image alone, 0.7 M cycles or 390 us; spread over the chip, eight images
take 24 us. Backward takes five a scale, four at the last, and one for the codebook: 50. Counted for an H100 (60 TFLOP/s
in fp32 outside the tensor cores, 3.0 TB/s) at batch 8: the search is 1.43 GFLOP, 24 us, the convolutions 0.38 GFLOP,
6.3 us, backward 0.75 GFLOP, 12.6 us; f_hat and the rest move 0.8 MB a scale, which stays in the L2 cache. At batch 1
launches decide: a CUDA graph holds them all. Scales of 2048 vectors and more, of 50 images the last four, are searched
behind nearest_code's filter in bf16.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from harness.case import Case, agree, nbytes
from torch import Tensor

from var_ext import _C, ScaleSchedule, ops, reference
from var_ext.schedule import SCALES_256

SHAPES = {
    f"{batch} x 32 x 16 x 16, 4096 codes{', forward + backward' if backward_pass else ''}": dict(
        batch=batch, channels=32, codes=4096, patch_nums=SCALES_256, backward_pass=backward_pass
    )
    for batch, backward_pass in ((1, False), (8, False), (8, True))
}
GPU_SHAPES = {
    f"{batch} x 32 x 16 x 16, 4096 codes{', forward + backward' if backward_pass else ''}, fp32": dict(
        batch=batch, channels=32, codes=4096, patch_nums=SCALES_256, backward_pass=backward_pass
    )
    for batch, backward_pass in ((1, False), (8, False), (50, False), (8, True), (50, True))
}
SMOKE = dict(batch=1, channels=4, codes=16, patch_nums=(1, 2, 3), backward_pass=True)


def mostly_equal(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Rounding may turn a near-tie, and with it the finer tokens of that place: a few of thousands."""
    equal = result[0] == expected[0]  # (B, L)
    share = equal.double().mean().item()
    assert share > 0.99, f"only {share:.2%} of the tokens agree with the reference"
    whole = equal.all(1)  # f_hat follows from the tokens
    agree(result[1][whole], expected[1][whole])


def first_two(quantize: Any, *arguments: Any) -> tuple[Tensor, ...]:
    return quantize(*arguments)[:2]


def with_gradients(quantize: Any, features: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """As in training the tokenizer: f_hat after each scale is drawn to the features; gradients at the end."""
    tokens, f_hat, scales = quantize(features, *rest, per_scale=True)
    loss = (scales - features.detach()).square().mean()
    grads = torch.autograd.grad((loss, f_hat), (features, *rest[:3]), (None, torch.ones_like(f_hat)))
    return tokens, f_hat, *grads


def case(batch: int, channels: int, codes: int, patch_nums: tuple[int, ...], backward_pass: bool) -> Case:
    schedule = ScaleSchedule(patch_nums)
    side = schedule.side
    features, codebook = torch.randn(batch, channels, side, side), torch.randn(codes, channels)
    weight, bias = torch.randn(4, channels, channels, 3, 3) * 0.05, torch.randn(4, channels) * 0.05
    phi_index = [k * 4 // len(schedule) for k in range(len(schedule))]
    for tensor in (features, codebook, weight, bias):
        tensor.requires_grad_(backward_pass)
    arguments = (features, codebook, weight, bias, phi_index, schedule)
    functions = {"var_ext": ops.residual_quantize, "reference": reference.residual_quantize}
    search = 2 * batch * schedule.num_tokens * codes * channels
    sizes = [(batch * side**2, codes, channels) for side in patch_nums]
    filtered = sum(
        n
        for n, *rest in sizes
        if _C.nearest_code_scratch(n, *rest) != _C.nearest_code_scratch(n, *rest, filter=False)
    )
    convolutions = 2 * batch * len(schedule) * side * side * channels * channels * 9
    scales = len(schedule) * nbytes(features) if backward_pass else 0  # written, and their gradients read
    unused = len(weight) - len(set(phi_index))  # their gradients are zeros: two launches each
    return Case(
        {
            name: partial(with_gradients, function, *arguments)
            if backward_pass
            else partial(first_two, function, *arguments)
            for name, function in functions.items()
        },
        bytes=nbytes(features, features, codebook, weight) + batch * schedule.num_tokens * 8 + 2 * scales,
        flops=search + convolutions * (3 if backward_pass else 1),
        tensor_flops=2 * filtered * (codes - 11) * channels,
        launches=2 + 4 * len(schedule) + (5 * len(schedule) + 2 * unused if backward_pass else 0),
        check=mostly_equal,
        laps=3,  # slow enough to be steady
    )
