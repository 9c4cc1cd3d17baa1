"""One step of decoding: a scale's codes into f_hat, and the next scale's input out of it."""

from __future__ import annotations

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import FLOATS, as_size, check_dtype, check_shape, check_together, require
from var_ext.ops._registry import compose


def _composed(
    f_hat: Tensor, embedding: Tensor, phi_weight: Tensor, phi_bias: Tensor, next_size: list[int], ratio: float
) -> tuple[Tensor, Tensor]:
    from var_ext import ops

    size = (next_size[0], next_size[1]) if next_size else None
    new, pooled = reference.residual_step(
        f_hat, embedding, phi_weight, phi_bias, next_size=size, ratio=ratio, primitives=ops
    )
    return new, pooled if next_size else f_hat.new_empty(0)  # outputs of an op must not alias


compose(
    "residual_step(Tensor f_hat, Tensor embedding, Tensor phi_weight, Tensor phi_bias, "
    "SymInt[] next_size, float ratio) -> (Tensor, Tensor)",
    _composed,
)


def residual_step(
    f_hat: Tensor,
    embedding: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    *,
    next_size: int | tuple[int, int] | None = None,
    ratio: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """f_hat + phi(upsample(embedding)), and its area-downsample at the next scale's size (paper, Algorithm 2).

    phi(x) = (1 - ratio) x + ratio conv3x3(x). Codes that have the size of f_hat already are not resampled.

    Args:
        f_hat: (B, C, H, W), the sum of the scales so far; not changed. float32 (float64, bfloat16, float16).
        embedding: (B, C, h, w), codes of this scale, or mixtures of codes.
        phi_weight, phi_bias: (C, C, 3, 3) and (C,).
        next_size: side or (h, w) of the next scale; None at the last one.
        ratio: weight of the convolution in phi.

    Returns:
        the new f_hat, (B, C, H, W), and the next scale's input, (B, C, *next_size); the new f_hat itself for None.

    Raises:
        ValueError: shapes do not match, or tensors lie on different devices.
        TypeError: dtypes differ or are not supported.
    """
    op = "residual_step"
    check_shape(op, "f_hat", f_hat, "(B, C, H, W)", None, None, None, None)
    batch, channels = f_hat.shape[:2]
    check_shape(op, "embedding", embedding, "(B, C, h, w)", batch, channels, None, None)
    require(
        min(embedding.shape[2:]) >= 1, op, "embedding must have a row and a column", tuple(embedding.shape)
    )
    check_shape(op, "phi_weight", phi_weight, "(C, C, 3, 3)", channels, channels, 3, 3)
    check_shape(op, "phi_bias", phi_bias, "(C,)", channels)
    check_dtype(op, "f_hat", f_hat, FLOATS)
    check_together(op, f_hat=f_hat, embedding=embedding, phi_weight=phi_weight, phi_bias=phi_bias)
    size = None if next_size is None else as_size(op, next_size)
    if backend.current() == "reference":
        return reference.residual_step(f_hat, embedding, phi_weight, phi_bias, next_size=size, ratio=ratio)
    new, pooled = torch.ops.var_ext.residual_step(f_hat, embedding, phi_weight, phi_bias, size or (), ratio)
    return new, new if size is None else pooled
