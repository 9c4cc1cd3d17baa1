"""residual_step of eight 256 px images: a coarse scale, a fine one, and the last; forward, and with its gradients.

On CUDA one launch forward, where an image has up to 256 pixels (two beyond that, for the next scale's windows); four
backward: the mirrored convolution, the gather to the codes (not at the last scale), sums of parts, sums of those; and
one in front where the next scale's windows have a gradient.
Counted for an H100 (60 TFLOP/s in fp32 outside the tensor cores, 3.0 TB/s): eight images are 38 MFLOP and 0.6 MB,
0.6 us of arithmetic, and three times that with gradients; at batch 1 a launch takes longer than the work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness.case import Case, compiled, nbytes
from torch import Tensor

from var_ext import ops, reference

SHAPES = {
    f"{batch} x 32 x 16 x 16, {name}{', forward + backward' if backward_pass else ''}": dict(
        batch=batch, channels=32, side=16, scale=scale, following=following, backward_pass=backward_pass
    )
    for batch, backward_pass in ((8, False), (1, False), (8, True))
    for name, scale, following in (("scale 2 -> 3", 2, 3), ("scale 13 -> 16", 13, 16), ("last", 16, None))
}
SHAPES["10 x 16 x 8 x 8, scale 3 -> 4"] = dict(
    batch=10, channels=16, side=8, scale=3, following=4, backward_pass=False
)
GPU_SHAPES = {
    f"{batch} x 32 x 16 x 16, {name}{', forward + backward' if backward_pass else ''}, fp32": dict(
        batch=batch, channels=32, side=16, scale=scale, following=following, backward_pass=backward_pass
    )
    for batch, backward_pass in ((8, False), (50, False), (50, True))
    for name, scale, following in (("scale 2 -> 3", 2, 3), ("scale 13 -> 16", 13, 16), ("last", 16, None))
}
SMOKE = dict(batch=1, channels=4, side=5, scale=2, following=3, backward_pass=True)


def with_gradients(step: Callable[[], tuple[Tensor, Tensor]], given: list[Tensor]) -> tuple[Tensor, ...]:
    new, pooled = step()
    outputs = [new] if pooled is new else [new, pooled]
    return torch.autograd.grad(outputs, given, [torch.full_like(t, 0.1) for t in outputs])


def case(
    batch: int, channels: int, side: int, scale: int, following: int | None, backward_pass: bool
) -> Case:
    f_hat = torch.randn(batch, channels, side, side)
    embedding = torch.randn(batch, scale, scale, channels).permute(0, 3, 1, 2)  # as codes come: channels last
    weight, bias = torch.randn(channels, channels, 3, 3) * 0.05, torch.randn(channels) * 0.05
    given = [t.requires_grad_(backward_pass) for t in (f_hat, embedding, weight, bias)]
    calls: dict[str, Callable[[], Any]] = {
        "var_ext": partial(ops.residual_step, *given, next_size=following),
        "reference": partial(reference.residual_step, *given, next_size=following),
        "torch.compile": compiled(reference.residual_step, *given, next_size=following),
    }
    if backward_pass:
        calls = {name: partial(with_gradients, call, given) for name, call in calls.items()}
    passes = 3 if backward_pass else 1  # gradients of codes and of weights, each as expensive as forward
    return Case(
        calls,
        bytes=passes * nbytes(*given, f_hat)
        + (batch * channels * following * following * 4 if following else 0),
        launches=(6 if following else 4) if backward_pass else 1,
        flops=passes * 2 * batch * side * side * channels * channels * 9,
    )
