"""adaln at the width of d16, both halves of guidance, with and without the residual branch; sampling and training.

"torch eager" is what a user would write, in the dtype of x; the reference computes in fp32 whatever x is.

On a GPU, in passes over (B, L, C): forward 2 (x; y) or with a branch 4 (x, branch; h, y), one launch; backward 3
(grad_y, x; grad_x) or 6 (grad_y, grad_h, x, branch; grad_x, grad_branch), two launches. Sums over tokens stay in the
second-level cache: B P vectors C floats, written and read once. At 3.0 TB/s, 2 x 680 x 1024 in bf16: 1.9 us and 2.8
us, with a branch 3.7 us and 5.6 us; launches decide there. 64 x 680 x 1920: 111 us and 167 us, with a branch 223 us
and 334 us.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness.case import Case, agree, agree_by_largest, compiled, forward_backward, nbytes
from torch import Tensor
from torch.nn import functional as F

from var_ext import ops, reference

FORMS = {
    "": dict(branch=False, training=False),
    ", with branch": dict(branch=True, training=False),
    ", forward + backward": dict(branch=False, training=True),
    ", with branch, forward + backward": dict(branch=True, training=True),
}
SHAPES = {
    f"2 x 680 x 1024{form}{suffix}": dict(batch=2, length=680, channels=1024, dtype=dtype, **given)
    for suffix, dtype in (("", "float32"), (", bf16", "bfloat16"))
    for form, given in FORMS.items()
}
GPU_SHAPES = {
    f"{batch} x {length} x {channels}{form}, {dtype}": dict(
        batch=batch, length=length, channels=channels, dtype=kind, **given
    )
    for dtype, kind in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"))
    for batch, length, channels, forms in (
        (32, 680, 1024, FORMS),  # training d16
        (16, 256, 1920, (", with branch",)),  # the last scale of eight images of d30, with guidance
        (100, 256, 1024, (", with branch",)),  # of fifty of d16
        (16, 1, 1024, (", with branch",)),  # the first scale
    )
    for form, given in FORMS.items()
    if form in forms and (dtype == "bf16" or (length == 680 and "backward" in form))
}
SMOKE = dict(batch=2, length=5, channels=16, branch=True, training=True, dtype="float32")


def eager(
    x: Tensor, scale: Tensor, shift: Tensor, branch: Tensor | None = None, gate: Tensor | None = None
) -> Any:
    h = x if branch is None or gate is None else x + gate[:, None] * branch
    y = F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    return y if branch is None else (h, y)


def case(batch: int, length: int, channels: int, branch: bool, training: bool, dtype: str) -> Case:
    kind = getattr(torch, dtype)
    x, residual = torch.randn(2, batch, length, channels).to(kind)
    scale, shift, gate = torch.randn(batch, 6, channels).to(kind)[:, :3].unbind(1)  # as the model has them
    arguments = [x, scale, shift, *([residual, gate] if branch else [])]
    grads = list(torch.randn(1 + branch, batch, length, channels).to(kind))

    def positional(function: Callable[..., Any]) -> Callable[..., Any]:
        if not branch:
            return function
        return lambda x, scale, shift, branch, gate: function(x, scale, shift, branch=branch, gate=gate)

    def competitor(function: Callable[..., Any]) -> Callable[[], Any]:
        return forward_backward(function, arguments, grads) if training else partial(function, *arguments)

    passes = (3 if training else 0) + 2  # x, y; backward reads x and the gradient, and writes one
    return Case(
        {
            "var_ext": competitor(positional(ops.adaln)),
            "reference": competitor(positional(reference.adaln)),
            "torch eager": competitor(positional(eager)),
            "torch.compile": competitor(compiled(positional(reference.adaln))),
        },
        launches=3 if training else 1,  # backward: the rows, then the sums over tokens
        bytes=nbytes(x) * passes * (2 if branch else 1) + nbytes(scale, shift),
        check=agree_by_largest if training or kind != torch.float32 else agree,
    )
