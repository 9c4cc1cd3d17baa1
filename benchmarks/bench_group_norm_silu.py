"""group_norm_silu of the decoder: its widest and its deepest map, in both memory formats.

On a GPU forward reads x twice and writes y, in three launches, or two where an image has few chunks of pixels, channels
last; backward reads x and grad twice and writes grad_x, in four: forward keeps the statistics. The second read may come
from a cache. At 3.0 TB/s, all counted, 1 x 160 x 256 x 256 in bf16: 21.0 us and 35.0 us; 1 x 640 x 16 x 16: 0.3 us and
0.5 us, where launches decide.
"""

from __future__ import annotations

from typing import Any

import torch
from harness.case import Case, agree, agree_in_16_bits, compiled, nbytes

from var_ext import ops, reference

DTYPES = {"": torch.float32, ", bf16": torch.bfloat16}
SHAPES = {
    f"1 x {channels} x {side} x {side}, {layout}{', with backward' if train else ''}{name}": dict(
        batch=1, channels=channels, side=side, layout=layout, dtype=dtype, train=train
    )
    for channels, side in ((160, 256), (640, 16))
    for layout in ("contiguous", "channels last")
    for train in (False, True)
    for name, dtype in DTYPES.items()
}
GPU_SHAPES = {
    f"{batch} x {channels} x {side} x {side}, channels last{', with backward' if train else ''}, {dtype}": dict(
        batch=batch, channels=channels, side=side, layout="channels last", dtype=kind, train=train
    )
    for dtype, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
    for batch, channels, side, train in (
        (8, 160, 256, False),
        (8, 160, 256, True),
        (8, 320, 64, False),
        (8, 640, 16, False),
        (50, 640, 16, False),
    )
    if dtype == "bf16" or side == 256
}
SMOKE = dict(batch=1, channels=32, side=3, layout="channels last", dtype=torch.float32, train=True)


def case(batch: int, channels: int, side: int, layout: str, dtype: torch.dtype, train: bool) -> Case:
    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    given = torch.randn(2, batch, channels, side, side).to(dtype)
    x, grad = (part.contiguous(memory_format=formats[layout]) for part in given)
    grad /= batch * side * side  # the gradients of the parameters are sums over all pixels
    parameters = torch.randn(2, channels).to(dtype)
    x, weight, bias = (t.requires_grad_(train) for t in (x, *parameters.unbind()))
    calls = {
        "var_ext": lambda: ops.group_norm_silu(x, weight, bias),
        "reference": lambda: reference.group_norm_silu(x, weight, bias),
        "torch.compile": compiled(reference.group_norm_silu, x, weight, bias),
    }

    def step(call: Any) -> Any:
        y = call()
        return (y.detach(), *torch.autograd.grad(y, [x, weight, bias], grad)) if train else y

    launches = 2 if side <= 16 and layout == "channels last" else 3  # by the rule beside the kernel
    return Case(
        {name: lambda call=call: step(call) for name, call in calls.items()},  # type: ignore[misc]
        bytes=nbytes(x) * (5 if train else 2),
        launches=launches + 4 * train,
        check=agree if dtype == torch.float32 else agree_in_16_bits,
    )
