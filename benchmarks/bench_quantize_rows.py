"""quantize_rows before linear layers of int8: d16's widths at small and large batches.

On a GPU one launch reads x once and writes a byte an element. At 3.0 TB/s, 4096 x 4096 in bf16: 50 MB, 17 us; 16000 x
7680: 369 MB, 123 us.
"""

from __future__ import annotations

import torch
from harness.case import Case, compiled, nbytes, same
from torch import Tensor

from var_ext import ops, reference

DTYPES = {"": torch.float32, ", bf16": torch.bfloat16}
SHAPES = {
    f"{rows} x {channels}{name}": dict(rows=rows, channels=channels, dtype=dtype)
    for rows, channels in ((512, 1024), (512, 4096), (4096, 4096))
    for name, dtype in DTYPES.items()
}
GPU_SHAPES = {
    f"{rows} x {channels}, {name}": dict(rows=rows, channels=channels, dtype=dtype)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
    for rows, channels in (
        (16, 1024),  # the first scale of eight images of d16, with guidance
        (512, 4096),
        (4096, 4096),  # the last scale
        (16000, 7680),  # the last scale of d30, large batch
    )
    if name == "bf16" or rows == 4096
}
SMOKE = dict(rows=3, channels=5, dtype=torch.float32)


def nearly_same(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """A compiler may divide and round in its own way: a step of the scale, and of a byte."""
    torch.testing.assert_close(result[1], expected[1], rtol=2.0**-7, atol=0)
    torch.testing.assert_close(result[0].int(), expected[0].int(), rtol=0, atol=2)


def case(rows: int, channels: int, dtype: torch.dtype) -> Case:
    x = torch.randn(rows, channels).to(dtype)
    return Case(
        {
            "var_ext": lambda: ops.quantize_rows(x),
            "reference": lambda: reference.quantize_rows(x),
            "torch.compile": compiled(reference.quantize_rows, x),
        },
        bytes=nbytes(x) + rows * channels + rows * 4,
        launches=1,
        check=same,
        checks={"torch.compile": nearly_same},
    )
