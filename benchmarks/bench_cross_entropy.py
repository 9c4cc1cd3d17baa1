"""cross_entropy of the 4096 codes of a training step, forward and backward: 4 images of 256 px, and 64 of 32 px."""

from __future__ import annotations

from typing import Any

import torch
from harness.case import Case, compiled, nbytes

from var_ext import ops, reference

SHAPES = {
    f"{rows} x {classes}": dict(rows=rows, classes=classes) for rows, classes in ((2720, 4096), (640, 4096))
}
SMOKE = dict(rows=3, classes=5)


def case(rows: int, classes: int) -> Case:
    logits = torch.randn(rows, classes, requires_grad=True)
    targets = torch.randint(classes, (rows,))
    calls = {
        "var_ext": lambda: ops.cross_entropy(logits, targets),
        "reference": lambda: reference.cross_entropy(logits, targets),
        "torch.compile": compiled(reference.cross_entropy, logits, targets),
    }

    def step(call: Any) -> Any:
        losses = call()
        return (losses.detach(), *torch.autograd.grad(losses.mean(), logits))

    return Case(
        {name: lambda call=call: step(call) for name, call in calls.items()},  # type: ignore[misc]
        bytes=3 * nbytes(logits),
    )
