"""What is timed: competitors on the same inputs, how their results are compared, and what the work comes to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

COMPILED = ("torch.compile", "FlexAttention")  # competitors that compile at their first call
compile_backend = "inductor"  # the smoke run takes "eager": the same calls without waiting for a compiler


def agree(result: Any, expected: Any) -> None:
    """Nested tensors agree to fp32 rounding over a few thousand summands."""
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4, check_stride=False)


def agree_in_16_bits(result: Any, expected: Any) -> None:
    """Nested tensors agree to a few roundings of bfloat16, 2^-8 each."""
    torch.testing.assert_close(result, expected, rtol=3e-2, atol=3e-2, check_stride=False)


def agree_by_largest(result: Any, expected: Any) -> None:
    """Tensors agree to a few roundings of bfloat16 of their largest element: sums over many rows are among them."""
    pairs = zip(result, expected, strict=True) if isinstance(result, tuple | list) else [(result, expected)]
    for one, other in pairs:
        torch.testing.assert_close(
            one, other, rtol=0, atol=3e-2 * other.abs().max().item(), check_stride=False
        )


def same(result: Any, expected: Any) -> None:
    """Nested tensors are equal in every element."""
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@dataclass
class Case:
    """Competitors on the inputs of one shape, the reference among them.

    Args:
        competitors: name -> a call without arguments; the others are checked against "reference".
        bytes: the least the op must read and write.
        flops: the least it must compute.
        tensor_flops: of these, what var_ext computes in bfloat16 on a GPU, whatever the dtype.
        launches: kernels that var_ext launches on a GPU for one call; 0 if not counted.
        images: pictures that one call draws or learns from (end to end only).
        check: compares a competitor's result with the reference's; raises AssertionError.
        checks: the same for competitors that need another check.
        laps: how often the competitors alternate, so that a noisy minute hits all of them.
        lap: seconds of work of a competitor in a lap, at least one call; None: what the clock needs.
    """

    competitors: Mapping[str, Callable[[], Any]]
    bytes: int = 0
    flops: int = 0
    tensor_flops: int = 0
    launches: int = 0
    images: int = 0
    check: Callable[[Any, Any], None] = agree
    checks: Mapping[str, Callable[[Any, Any], None]] = field(default_factory=dict)
    laps: int = 5
    lap: float | None = None

    def verify(self, name: str) -> None:
        """Compares a competitor's result with the reference's. This also warms it up."""
        result = self.competitors[name]()
        if name != "reference" and "reference" in self.competitors:
            self.checks.get(name, self.check)(result, self.competitors["reference"]())


def compiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """A competitor: torch.compile of a function, for these arguments."""
    return partial(torch.compile(function, backend=compile_backend, dynamic=False), *args, **kwargs)


def nbytes(*tensors: torch.Tensor) -> int:
    """Bytes of all elements of the tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def backward(output: torch.Tensor, inputs: list[torch.Tensor]) -> Callable[[], Any]:
    """A competitor: only the backward pass, from a fixed gradient."""
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(output)
    return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)


def forward_backward(
    function: Callable[..., Any], inputs: list[torch.Tensor], grads: list[torch.Tensor]
) -> Callable[[], Any]:
    """A competitor: a call, and the gradients of all inputs for fixed gradients of its outputs."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]

    def run() -> Any:
        outputs = function(*leaves)
        return torch.autograd.grad(outputs if isinstance(outputs, tuple) else (outputs,), leaves, grads)

    return run
