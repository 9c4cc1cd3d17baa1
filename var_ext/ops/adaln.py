"""Adaptive LayerNorm, with the gated residual in front of it."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import FLOATS, check_dtype, check_shape, check_together
from var_ext.ops._registry import compose

compose(
    "adaln(Tensor x, Tensor scale, Tensor shift, float eps) -> Tensor",
    lambda x, scale, shift, eps: reference.adaln(x, scale, shift, eps=eps),
)
compose(
    "adaln_residual(Tensor x, Tensor scale, Tensor shift, Tensor branch, Tensor gate, float eps) -> (Tensor, Tensor)",
    lambda x, scale, shift, branch, gate, eps: reference.adaln(
        x, scale, shift, branch=branch, gate=gate, eps=eps
    ),
)


@overload
def adaln(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor: ...
@overload
def adaln(
    x: Tensor, scale: Tensor, shift: Tensor, *, branch: Tensor, gate: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]: ...
def adaln(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = LayerNorm(x) * (1 + scale) + shift, optionally after x += gate * branch (paper, section 3.2; DiT).

    Args:
        x: (B, L, C), float32, bfloat16, float16 or float64.
        scale, shift: (B, C), dtype of x.
        branch: (B, L, C), the output of the branch before; needs `gate`.
        gate: (B, C).
        eps: added to the variance; LayerNorm has no weights of its own.

    Returns:
        y, (B, L, C), or with a branch the new x and y.

    Raises:
        ValueError: shapes do not match, branch without gate, or tensors lie on different devices.
        TypeError: dtypes differ or are not supported.
    """
    op = "adaln"
    check_shape(op, "x", x, "(B, L, C)", None, None, None)
    batch, _, channels = x.shape
    check_shape(op, "scale", scale, "(B, C)", batch, channels)
    check_shape(op, "shift", shift, "(B, C)", batch, channels)
    if (branch is None) != (gate is None):
        missing = "branch" if branch is None else "gate"
        raise ValueError(f"{op}: branch and gate must be given together, got no {missing}")
    if branch is not None and gate is not None:
        check_shape(op, "branch", branch, "(B, L, C)", *x.shape)
        check_shape(op, "gate", gate, "(B, C)", batch, channels)
    check_dtype(op, "x", x, FLOATS)
    check_together(op, x=x, scale=scale, shift=shift, branch=branch, gate=gate)
    if backend.current() == "reference":
        return reference.adaln(x, scale, shift, branch=branch, gate=gate, eps=eps)
    if branch is None:
        return torch.ops.var_ext.adaln(x, scale, shift, eps)
    return torch.ops.var_ext.adaln_residual(x, scale, shift, branch, gate, eps)
