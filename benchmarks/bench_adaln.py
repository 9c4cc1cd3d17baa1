"""adaln at the width of d16, both halves of guidance, with and without the residual branch."""

from __future__ import annotations

import torch
from contest import Contest, compiled, nbytes

from var_ext import ops, reference

SHAPES = {
    "2 x 680 x 1024": dict(batch=2, length=680, channels=1024, branch=False),
    "2 x 680 x 1024, with branch": dict(batch=2, length=680, channels=1024, branch=True),
}
SMOKE = dict(batch=2, length=5, channels=16, branch=True)
COMPETITORS = ("var_ext", "reference", "torch.compile")


def contest(batch: int, length: int, channels: int, branch: bool) -> Contest:
    x, residual = torch.randn(2, batch, length, channels)
    scale, shift, gate = torch.randn(3, batch, channels)
    extra = dict(branch=residual, gate=gate) if branch else {}
    return Contest(
        {
            "var_ext": lambda: ops.adaln(x, scale, shift, **extra),
            "reference": lambda: reference.adaln(x, scale, shift, **extra),
            "torch.compile": compiled(reference.adaln, x, scale, shift, **extra),
        },
        bytes=nbytes(x) * (4 if branch else 2) + nbytes(scale, shift),
    )


def test_adaln(race) -> None:
    race()
