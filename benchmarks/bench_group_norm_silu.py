"""group_norm_silu of the decoder: its widest and its deepest map, in both memory formats."""

from __future__ import annotations

import torch
from contest import Contest, compiled, nbytes

from var_ext import ops, reference

SHAPES = {
    f"1 x {channels} x {side} x {side}, {layout}": dict(channels=channels, side=side, layout=layout)
    for channels, side in ((160, 256), (640, 16))
    for layout in ("contiguous", "channels last")
}
SMOKE = dict(channels=32, side=3, layout="channels last")
COMPETITORS = ("var_ext", "reference", "torch.compile")


def contest(channels: int, side: int, layout: str) -> Contest:
    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    x = torch.randn(1, channels, side, side).to(memory_format=formats[layout])
    weight, bias = torch.randn(2, channels)
    return Contest(
        {
            "var_ext": lambda: ops.group_norm_silu(x, weight, bias),
            "reference": lambda: reference.group_norm_silu(x, weight, bias),
            "torch.compile": compiled(reference.group_norm_silu, x, weight, bias),
        },
        bytes=nbytes(x, x),
    )


def test_group_norm_silu(race) -> None:
    race()
