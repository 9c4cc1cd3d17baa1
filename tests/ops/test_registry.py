"""What registration promises of every op: empty tensors, transforms, threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.threads import threads
from var_ext import ScaleSchedule, ops, splitmix64

SCHEDULE = ScaleSchedule((1, 2))


def qk_norm(qkv: Tensor, bias: Tensor) -> Tensor:
    return torch.cat(ops.qk_norm(qkv, bias, bias), dim=-1)


DIFFERENTIABLE: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "adaln": (ops.adaln, ((2, 5, 8), (2, 8), (2, 8))),
    "area_downsample": (lambda x: ops.area_downsample(x, 2), ((2, 3, 5, 5),)),
    "bias_gelu": (ops.bias_gelu, ((2, 5, 8), (8,))),
    "bicubic_upsample": (lambda x: ops.bicubic_upsample(x, 7), ((2, 3, 5, 5),)),
    "block_causal_attention": (
        lambda q, k, v: ops.block_causal_attention(q, k, v, SCHEDULE),
        ((2, 5, 2, 8),) * 3,
    ),
    "group_norm_silu": (lambda x, w, b: ops.group_norm_silu(x, w, b, groups=2), ((2, 4, 3, 3), (4,), (4,))),
    "keyed_dropout": (
        lambda x: ops.keyed_dropout(x, torch.arange(len(x)), splitmix64.counter(3), 2**15),
        ((2, 5, 8),),
    ),
    "linear": (ops.linear, ((5, 8), (3, 8), (3,))),
    "qk_norm": (qk_norm, ((2, 5, 3, 2, 8), (2, 8))),
}


def inputs(shapes: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_batch_of_none_has_gradients(either_backend: str, name: str) -> None:
    """The gradient of a sum is expanded, of stride 0: an empty one stays so."""
    op, shapes = DIFFERENTIABLE[name]
    of_samples = (
        len(shapes) if name in ("adaln", "block_causal_attention") else 1
    )  # the others are parameters
    given = inputs(tuple((0, *s[1:]) if n < of_samples else s for n, s in enumerate(shapes)))
    op(*given).sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape and not t.grad.any() for t in given)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_is_refused_and_not_forgotten(name: str) -> None:
    op, shapes = DIFFERENTIABLE[name]
    first, *rest = (t.detach() for t in inputs(shapes))
    if name in ("keyed_dropout", "linear"):  # linear in x, and under torch's transforms torch's own
        _, tangent = torch.func.jvp(lambda x: op(x, *rest), (first,), (first,))
        torch.testing.assert_close(tangent, op(first, *rest[:1]))
        return
    with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|setup_context"):
        torch.func.jvp(lambda x: op(x, *rest), (first,), (first,))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_a_new_thread_obeys_the_number_of_threads() -> None:
    """OpenMP starts each thread of the program with a count of its own; torch's must be set before a kernel runs."""
    x, scale = torch.randn(2, 512, 512), torch.randn(2, 512)
    counts: list[int] = []

    def run() -> None:
        before = len(os.listdir("/proc/self/task"))
        ops.adaln(x, scale, scale)
        counts.append(len(os.listdir("/proc/self/task")) - before)

    with threads(1):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert counts == [0]
