"""bias_residual of the decoder: its widest and its deepest map, in both memory formats.

On a GPU it reads h and x and writes y in one launch. At 3.0 TB/s, 1 x 160 x 256 x 256 in bf16: 21.0 us; 1 x 640 x 16
x 16: 0.3 us, where the launch decides.
"""

from __future__ import annotations

import torch
from harness.case import Case, agree, agree_in_16_bits, compiled, nbytes

from var_ext import ops, reference

SHAPES = {
    f"1 x {channels} x {side} x {side}, {layout}{name}": dict(
        batch=1, channels=channels, side=side, layout=layout, dtype=dtype
    )
    for channels, side in ((160, 256), (640, 16))
    for layout in ("contiguous", "channels last")
    for name, dtype in {"": torch.float32, ", bf16": torch.bfloat16}.items()
}
GPU_SHAPES = {
    f"{batch} x {channels} x {side} x {side}, channels last, {dtype}": dict(
        batch=batch, channels=channels, side=side, layout="channels last", dtype=kind
    )
    for dtype, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
    for batch, channels, side in ((8, 160, 256), (8, 320, 64), (8, 640, 16), (50, 640, 16))
    if dtype == "bf16" or side == 256
}
SMOKE = dict(batch=1, channels=8, side=3, layout="channels last", dtype=torch.float32)


def case(batch: int, channels: int, side: int, layout: str, dtype: torch.dtype) -> Case:
    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    given = torch.randn(2, batch, channels, side, side).to(dtype)
    h, x = (part.contiguous(memory_format=formats[layout]) for part in given)
    bias = torch.randn(channels).to(dtype)
    return Case(
        {
            "var_ext": lambda: ops.bias_residual(h, x, bias),
            "reference": lambda: reference.bias_residual(h, x, bias),
            "two sums": lambda: (h + bias[:, None, None]).add_(x),  # what torch does on a GPU
            "torch.compile": compiled(reference.bias_residual, h, x, bias),
        },
        bytes=3 * nbytes(h),
        launches=1,
        check=agree if dtype == torch.float32 else agree_in_16_bits,
    )
