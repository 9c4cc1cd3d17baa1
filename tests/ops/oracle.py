"""What the op tests measure against: slow, obvious float64 code that shares nothing with the ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from var_ext import ScaleSchedule

LOW = (torch.float32, torch.bfloat16, torch.float16)
# Token counts where kernels break: one scale, two, and 7, 129 and 151 tokens.
ODD = {
    sum(side * side for side in sides): ScaleSchedule(sides)
    for sides in ((3,), (1, 2), (1, 1, 1, 2), (2, 5, 10), (1, 2, 3, 4, 11))
}


def assert_as_good_as_torch(result: Tensor, torch_result: Tensor, exact: Tensor) -> None:
    """The largest error is at most twice that of torch in the same dtype; both against float64.

    Both round differently, so neither is "the" answer; an op that is twice as far off has another reason than
    rounding. Half a unit in the last place is added for the final rounding, where torch happens to be exact.
    """
    assert result.dtype == torch_result.dtype
    assert result.shape == exact.shape
    if not exact.numel():
        return
    exact = exact.double()
    error, torch_error = ((t.double() - exact).abs().max().item() for t in (result, torch_result))
    rounding = torch.finfo(result.dtype).eps / 2 * exact.abs().max().item()
    assert error <= 2 * torch_error + rounding, f"error {error:.3g}, torch's own {torch_error:.3g}"


def assert_equal_up_to_rounding(result: Tensor, exact: Tensor) -> None:
    """float32 against float64: sums of up to some thousand terms of order one round to about 1e-6 of them."""
    torch.testing.assert_close(result.double(), exact.double(), rtol=1e-5, atol=1e-5)


def sees(schedule: ScaleSchedule) -> Tensor:
    """(L, L) bool: may this query see this key, asked one pair at a time."""
    scale_of = [k for k, side in enumerate(schedule.patch_nums) for _ in range(side * side)]
    return torch.tensor([[key <= query for key in scale_of] for query in scale_of])


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of (B, L, H, D) in the dtype of its arguments, each sum spelt out."""
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return torch.einsum("bhlm,bmhd->blhd", weights / weights.sum(dim=-1, keepdim=True), v)


def area_matrix(out: int, size: int) -> Tensor:
    """(out, size) float64: row i averages the entries that cell i touches."""
    rows = []
    for i in range(out):
        first, end = i * size // out, -(-(i + 1) * size // out)
        rows.append([1 / (end - first) if first <= j < end else 0.0 for j in range(size)])
    return torch.tensor(rows, dtype=torch.float64)


def bicubic_matrix(out: int, size: int, a: float = -0.75) -> Tensor:
    """(out, size) float64: cubic convolution weights of each output; those past a border go to its entry."""

    def kernel(t: float) -> float:
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    matrix = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        centre = (i + 0.5) * size / out - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), size - 1)] += kernel(centre - j)
    return matrix


def resampled(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A separable resampling of (B, C, H, W): rows (h, H), columns (w, W)."""
    return torch.einsum("hi,bcij,wj->bchw", rows, x.double(), columns)


def phi(x: Tensor, weight: Tensor, bias: Tensor, ratio: float) -> Tensor:
    """(1 - ratio) x + ratio conv3x3(x) as nine shifted products, float64."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    h, w = x.shape[2:]
    padded = torch.zeros(x.shape[0], x.shape[1], h + 2, w + 2, dtype=torch.float64)
    padded[:, :, 1:-1, 1:-1] = x
    total = bias[None, :, None, None]
    for i in range(3):
        for j in range(3):
            total = total + torch.einsum(
                "oc,bchw->bohw", weight[:, :, i, j], padded[:, :, i : i + h, j : j + w]
            )
    return (1 - ratio) * x + ratio * total


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python integers, from the definition in Salmon et al. 2011."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second % 2**32, (first >> 32) ^ c3 ^ k1, first % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def splitmix64(counter: int) -> int:
    """Word of a counter in Python integers, from the definition in Steele, Lea, Flood 2014."""
    x = counter % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of the inputs, for fixed gradients of the outputs."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return list(
        torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
    )


def unaligned(x: Tensor) -> Tensor:
    """The same values one element off every vector's alignment."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
