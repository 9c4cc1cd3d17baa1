"""What tests of attention share."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tests.cuda.conftest import Gpu
from tests.ops import oracle
from tests.ops.test_block_causal_attention import SCHEDULES, with_gradients
from var_ext import ScaleSchedule, ops

HEAD_SIZES = (32, 64, 128)
# each schedule with one head size and all of them with one
CASES = [
    *((s, HEAD_SIZES[i % 3]) for i, s in enumerate(SCHEDULES)),
    *((oracle.ODD[151], d) for d in HEAD_SIZES),
]


def on(
    gpu: Gpu, given: list[Tensor], grad: Tensor, schedule: ScaleSchedule, scale: float = 1.0
) -> list[Tensor]:
    """Result and gradients of the kernels."""
    op = partial(ops.block_causal_attention, schedule=schedule, scale=scale)
    return [t.cpu() for t in with_gradients(op, [gpu(t) for t in given], gpu(grad))]


def by_formula(given: list[Tensor], grad: Tensor, schedule: ScaleSchedule, scale: float) -> list[Tensor]:
    """The same from sums spelt out, in the dtype of the inputs."""
    return with_gradients(partial(oracle.attention, scale=scale, mask=oracle.sees(schedule)), given, grad)


def far_apart(x: Tensor) -> Tensor:
    """The same values, those of the second batch entry 2^31 elements further on."""
    far = 2**31
    place = torch.empty(far + x[0].numel(), dtype=x.dtype)
    shape = (x.shape[1] * x.shape[2] * x.shape[3], x.shape[2] * x.shape[3], x.shape[3], 1)
    return place.as_strided(x.shape, (far, *shape[1:])).copy_(x)
