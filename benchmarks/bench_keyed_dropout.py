"""keyed_dropout of a tokenizer: the widest map of 256 px and a smaller one, in both memory formats.

On a GPU it reads x and writes y in one launch, and again in the backward pass. At 3.0 TB/s, 4 x 160 x 256 x 256 in
bf16: 56 us each.
"""

from __future__ import annotations

from typing import Any

import torch
from harness.case import Case, compiled, nbytes, same

from var_ext import ops, reference, splitmix64

FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
DTYPES = {"": torch.float32, ", bf16": torch.bfloat16}
SHAPES = {
    f"{batch} x {channels} x {side} x {side}, {layout}{', with backward' if train else ''}{name}": dict(
        batch=batch, channels=channels, side=side, layout=layout, dtype=dtype, train=train
    )
    for batch, channels, side, layout in (
        (4, 160, 256, "channels last"),
        (64, 32, 64, "channels last"),
        (64, 32, 64, "contiguous"),
    )
    for train in (False, True)
    for name, dtype in DTYPES.items()
}
GPU_SHAPES = {
    f"{batch} x {channels} x {side} x {side}, {layout}, {dtype}": dict(
        batch=batch, channels=channels, side=side, layout=layout, dtype=kind, train=True
    )
    for dtype, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
    for batch, channels, side in ((4, 160, 256), (64, 32, 64))
    for layout in FORMATS
    if dtype == "bf16" or side == 256
}
SMOKE = dict(batch=2, channels=5, side=3, layout="channels last", dtype=torch.float32, train=True)


def case(batch: int, channels: int, side: int, layout: str, dtype: torch.dtype, train: bool) -> Case:
    x, grad = (
        part.contiguous(memory_format=FORMATS[layout])
        for part in torch.randn(2, batch, channels, side, side).to(dtype)
    )
    x.requires_grad_(train)
    given = x, torch.arange(batch), splitmix64.counter(1), round(0.9 * 2**16)
    calls = {
        "var_ext": lambda: ops.keyed_dropout(*given),
        "reference": lambda: reference.keyed_dropout(*given),
        "torch.compile": compiled(reference.keyed_dropout, *given),
    }

    def step(call: Any) -> Any:
        y = call()
        return (y.detach(), *torch.autograd.grad(y, x, grad)) if train else y

    return Case(
        {name: lambda call=call: step(call) for name, call in calls.items()},  # type: ignore[misc]
        bytes=nbytes(x) * (4 if train else 2),
        launches=2 if train else 1,
        check=same,
    )
