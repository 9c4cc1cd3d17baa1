"""What tests of attention share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.cuda.conftest import Gpu
from tests.ops import oracle
from tests.ops.test_block_causal_attention import SCHEDULES, with_gradients
from tests.ops.test_cached_attention import unnormed
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


def moved(gpu: Gpu, given: Sequence[Any]) -> list[Any]:
    """Arguments with their tensors on the GPU."""
    return [gpu(t) if isinstance(t, Tensor) else t for t in given]


def cached(gpu: Gpu, q: Tensor, keys: Tensor, values: Tensor, length: int, scale: float = 1.0) -> Tensor:
    """`cached_attention` as attention alone: q (B, l, H, D) to the first `length` keys, the last l of them new."""
    return ops.cached_attention(*moved(gpu, unnormed(q, keys, values, length)), scale=scale).cpu()


def by_formula(given: list[Tensor], grad: Tensor, schedule: ScaleSchedule, scale: float) -> list[Tensor]:
    """The same from sums spelt out, in the dtype of the inputs."""
    return with_gradients(partial(oracle.attention, scale=scale, mask=oracle.sees(schedule)), given, grad)


def far_apart(x: Tensor) -> Tensor:
    """The same values, those of the second batch entry 2^31 elements further on."""
    far, dense = 2**31, x.contiguous()
    place = torch.empty(far + x[0].numel(), dtype=x.dtype)
    return place.as_strided(x.shape, (far, *dense.stride()[1:])).copy_(x)
