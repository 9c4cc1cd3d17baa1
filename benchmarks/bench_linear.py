"""linear in a training step of 4 images of 256 px, 2720 tokens: the layers of d8 and d16, forward and backward.

"torch" is what it replaces: `F.linear` with float32 weights, in bf16 under autocast, which casts them each time.
"""

from __future__ import annotations

from typing import Any

import torch
from harness.case import Case, agree_by_largest, nbytes
from torch import Tensor
from torch.nn import functional as F

from var_ext import ops, reference

DTYPES = {"": torch.float32, ", bf16": torch.bfloat16}
SHAPES = {
    f"2720 x {inputs} -> {outputs}{name}": dict(rows=2720, inputs=inputs, outputs=outputs, dtype=dtype)
    for inputs, outputs in ((512, 1536), (512, 2048), (2048, 512), (1024, 1024), (1024, 4096), (4096, 1024))
    for name, dtype in DTYPES.items()
}
SMOKE = dict(rows=5, inputs=7, outputs=6, dtype=torch.bfloat16)


def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast("cpu", x.dtype, enabled=x.dtype != torch.float32):
        return F.linear(x, weight, bias)


def case(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> Case:
    x = torch.randn(rows, inputs).to(dtype).requires_grad_()
    weight = (torch.randn(outputs, inputs) / inputs**0.5).requires_grad_()
    bias = torch.randn(outputs, requires_grad=True)
    grad = torch.randn(rows, outputs).to(dtype)

    def step(linear: Any) -> Any:
        y = linear(x, weight, bias)
        return (y.detach(), *torch.autograd.grad(y, [x, weight, bias], grad))

    calls = {"var_ext": ops.linear, "reference": reference.linear, "torch": torchs}
    return Case(
        {name: lambda linear=linear: step(linear) for name, linear in calls.items()},  # type: ignore[misc]
        bytes=2 * nbytes(x, grad, weight) + nbytes(weight),
        flops=6 * rows * inputs * outputs,
        check=agree_by_largest,
    )
