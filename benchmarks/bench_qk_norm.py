"""qk_norm of d16: a whole training sequence.

"torch eager" is what a user would write, in the dtype of qkv; the reference computes in fp32 whatever qkv is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness.case import Case, agree, agree_by_largest, compiled, forward_backward, nbytes
from torch import Tensor
from torch.nn import functional as F

from var_ext import ops, reference

SHAPES = {
    f"2 x 680 x 3 x 16 x 64{form}{suffix}": dict(
        batch=2, length=680, heads=16, dim=64, training=training, dtype=dtype
    )
    for suffix, dtype in (("", "float32"), (", bf16", "bfloat16"))
    for form, training in (("", False), (", forward + backward", True))
}
GPU_SHAPES = {
    f"{batch} x 680 x 3 x {heads} x 64{form}, {dtype}": dict(
        batch=batch, length=680, heads=heads, dim=64, training=training, dtype=kind
    )
    for dtype, kind in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"))
    for batch, heads, training, form in (
        (32, 16, False, ""),  # d16
        (32, 16, True, ", forward + backward"),
        (16, 30, True, ", forward + backward"),  # d30
    )
    if dtype == "bf16" or heads == 16
}
SMOKE = dict(batch=1, length=3, heads=2, dim=8, training=False, dtype="float32")


def eager(qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    q, k, v = qkv.unbind(2)
    q = F.normalize(q + q_bias, dim=-1) * log_scale.clamp_max(math.log(100)).exp()[:, None]
    return q, F.normalize(k, dim=-1), v + v_bias


def case(batch: int, length: int, heads: int, dim: int, training: bool, dtype: str) -> Case:
    kind = getattr(torch, dtype)
    qkv = torch.randn(batch, length, 3, heads, dim).to(kind)
    arguments = [qkv, *torch.randn(2, heads, dim).to(kind), torch.randn(heads).to(kind)]
    grads = list(torch.randn(3, batch, length, heads, dim).to(kind))

    def competitor(function: Callable[..., Any]) -> Callable[[], Any]:
        if training:
            return forward_backward(function, arguments, grads)
        return partial(function, *arguments)

    return Case(
        {
            "var_ext": competitor(ops.qk_norm),
            "reference": competitor(reference.qk_norm),
            "torch eager": competitor(eager),
            "torch.compile": competitor(compiled(reference.qk_norm)),
        },
        # qkv is read and written; backward reads it again with the gradient, and writes another
        bytes=nbytes(qkv) * (5 if training else 2),
        launches=3 if training else 1,  # backward: the rows, then the sums of all blocks' partial sums
        check=agree_by_largest if training or kind != torch.float32 else agree,
    )
