"""area_downsample from the 16 x 16 grid to each token map of 256 px, forward and backward.

On CUDA one launch each way, and every byte moves once: B C (H W + h w) elements. At 3.0 TB/s of an H100 that is 0.15 us
for 16 -> 13 in float32 with B = 8, C = 32 (435 KB: the launch decides), and 6.8 us for 32 -> 24 with B = 100 (20.5 MB).
"""

from __future__ import annotations

from functools import partial

import torch
from harness.case import Case, backward, nbytes

from var_ext import ops, reference
from var_ext.schedule import SCALES_256

SHAPES = {
    f"16 -> {p}, {way}": dict(batch=8, channels=32, source=16, target=p, backward_pass=way == "backward")
    for way in ("forward", "backward")
    for p in SCALES_256[:-1]
}
GPU_SHAPES = {
    f"{batch} x 32 x 16 -> {p}, {way}, fp32": dict(
        batch=batch, channels=32, source=16, target=p, backward_pass=way == "backward"
    )
    for batch in (8, 50)
    for way in ("forward", "backward")
    for p in (1, 5, 13)
}
SMOKE = dict(batch=1, channels=2, source=5, target=3, backward_pass=True)


def case(batch: int, channels: int, source: int, target: int, backward_pass: bool) -> Case:
    x = torch.randn(batch, channels, source, source, requires_grad=backward_pass)
    y = reference.area_downsample(x, target)
    functions = {"var_ext": ops.area_downsample, "reference": reference.area_downsample}
    if backward_pass:
        calls = {name: backward(function(x, target), [x]) for name, function in functions.items()}
    else:
        calls = {name: partial(function, x, target) for name, function in functions.items()}
    return Case(calls, bytes=nbytes(x, y), launches=1)
