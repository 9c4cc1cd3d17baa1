"""bias_gelu of the feed-forward part of d16: training or the last scales of sampling, and small scales.

On a GPU forward moves x and y in one launch, backward grad, x and grad_x in two, and P C floats of sums twice. At 3.0
TB/s, 2 x 680 x 4096 in bf16: 7.4 us and 11.1 us; 64 x 680 x 7680: 446 us and 668 us.
"""

from __future__ import annotations

from typing import Any

import torch
from harness.case import Case, agree, agree_in_16_bits, compiled, nbytes

from var_ext import ops, reference

DTYPES = {"": torch.float32, ", bf16": torch.bfloat16}
SHAPES = {
    f"{batch} x {length} x {channels}{', with backward' if train else ''}{name}": dict(
        batch=batch, length=length, channels=channels, dtype=dtype, train=train
    )
    for batch, length, channels in ((2, 680, 4096), (20, 36, 1024))
    for train in (False, True)
    for name, dtype in DTYPES.items()
}
GPU_SHAPES = {
    f"{batch} x {length} x {channels}{', with backward' if train else ''}, {dtype}": dict(
        batch=batch, length=length, channels=channels, dtype=kind, train=train
    )
    for dtype, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
    for batch, length, channels, train in (
        (32, 680, 4096, False),  # training d16
        (32, 680, 4096, True),
        (16, 256, 7680, False),  # the last scale of eight images of d30, with guidance
        (100, 256, 4096, False),  # of fifty of d16
        (16, 1, 4096, False),  # the first scale
    )
    if dtype == "bf16" or train
}
SMOKE = dict(batch=2, length=3, channels=5, dtype=torch.float32, train=True)


def case(batch: int, length: int, channels: int, dtype: torch.dtype, train: bool) -> Case:
    x = torch.randn(batch, length, channels).to(dtype).requires_grad_(train)
    bias = torch.randn(channels).to(dtype).requires_grad_(train)
    # a small gradient of order 1 / rows: that of the bias is a sum over all of them
    grad = (torch.randn(x.shape) / (batch * length)).to(dtype)
    calls = {
        "var_ext": lambda: ops.bias_gelu(x, bias),
        "reference": lambda: reference.bias_gelu(x, bias),
        "torch.compile": compiled(reference.bias_gelu, x, bias),
    }

    def step(call: Any) -> Any:
        y = call()
        return (y.detach(), *torch.autograd.grad(y, [x, bias], grad)) if train else y

    return Case(
        {name: lambda call=call: step(call) for name, call in calls.items()},  # type: ignore[misc]
        bytes=nbytes(x) * (5 if train else 2),
        launches=3 if train else 1,  # backward: the rows, then the sums over them
        check=agree if dtype == torch.float32 else agree_in_16_bits,
    )
