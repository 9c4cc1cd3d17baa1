"""qk_norm of d16 with guidance: a whole training sequence, and the last scale of sampling into the cache.

"torch eager" is what a user would write, in the dtype of qkv; the reference computes in fp32 whatever qkv is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from contest import Contest, agree, agree_by_largest, compiled, forward_backward, nbytes
from torch import Tensor
from torch.nn import functional as F

from var_ext import ops, reference

FORMS = {
    "2 x 680 x 3 x 16 x 64": dict(length=680, offset=None, training=False),
    "2 x 680 x 3 x 16 x 64, forward + backward": dict(length=680, offset=None, training=True),
    "2 x 256 x 3 x 16 x 64, into the cache": dict(length=256, offset=424, training=False),
}
SHAPES = {
    name + suffix: dict(batch=2, heads=16, dim=64, dtype=dtype, **form)
    for suffix, dtype in (("", "float32"), (", bf16", "bfloat16"))
    for name, form in FORMS.items()
}
GPU_SHAPES = {
    f"{batch} x {length} x 3 x {heads} x 64{form}, {dtype}": dict(
        batch=batch, length=length, heads=heads, dim=64, offset=offset, training=training, dtype=kind
    )
    for dtype, kind in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"))
    for batch, length, heads, offset, training, form in (
        (32, 680, 16, None, False, ""),  # training d16
        (32, 680, 16, None, True, ", forward + backward"),
        (16, 680, 30, None, True, ", forward + backward"),  # d30
        (16, 256, 16, 424, False, ", into the cache"),  # the last scale of eight images, with guidance
        (100, 256, 16, 424, False, ", into the cache"),  # of fifty
        (16, 256, 30, 424, False, ", into the cache"),
        (16, 1, 16, 0, False, ", into the cache"),  # the first scale
    )
    if dtype == "bf16" or (batch, length) == (32, 680)
}
SMOKE = dict(batch=1, length=3, heads=2, dim=8, offset=2, training=False, dtype="float32")
COMPETITORS = ("var_ext", "reference", "torch eager", "torch.compile")


def eager(
    qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor, cache: Any = None, offset: int = 0
) -> Any:
    q, k, v = qkv.unbind(2)
    q = F.normalize(q + q_bias, dim=-1) * log_scale.clamp_max(math.log(100)).exp()[:, None]
    k, v = F.normalize(k, dim=-1), v + v_bias
    if cache is None:
        return q, k, v
    cache[0][:, offset : offset + k.shape[1]] = k
    cache[1][:, offset : offset + v.shape[1]] = v
    return q


def contest(
    batch: int, length: int, heads: int, dim: int, offset: int | None, training: bool, dtype: str
) -> Contest:
    kind = getattr(torch, dtype)
    qkv = torch.randn(batch, length, 3, heads, dim).to(kind)
    arguments = [qkv, *torch.randn(2, heads, dim).to(kind), torch.randn(heads).to(kind)]
    grads = list(torch.randn(3, batch, length, heads, dim).to(kind))

    def entrant(function: Callable[..., Any]) -> Callable[[], Any]:
        if training:
            return forward_backward(function, arguments, grads)
        if offset is None:
            return partial(function, *arguments)
        cache = tuple(torch.zeros(batch, offset + length, heads, dim, dtype=kind) for _ in range(2))
        return lambda: (function(*arguments, cache=cache, offset=offset), *cache)

    return Contest(
        {
            "var_ext": entrant(ops.qk_norm),
            "reference": entrant(reference.qk_norm),
            "torch eager": entrant(eager),
            "torch.compile": entrant(compiled(reference.qk_norm)),
        },
        # qkv is read and written; backward reads it again with the gradient, and writes another
        bytes=nbytes(qkv) * (5 if training else 2),
        launches=3 if training else 1,  # backward: the rows, then the sums of all blocks' partial sums
        check=agree_by_largest if training or kind != torch.float32 else agree,
    )


def test_qk_norm(race) -> None:
    race()
