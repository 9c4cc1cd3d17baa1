"""Reference of `residual_step`, and phi."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor
from torch.nn import functional as F

from var_ext import reference


def phi(x: Tensor, weight: Tensor, bias: Tensor, ratio: float) -> Tensor:
    """(1 - ratio) x + ratio conv3x3(x), on (B, C, H, W)."""
    return x * (1 - ratio) + F.conv2d(x, weight, bias, padding=1) * ratio


def upsampled_phi(
    embedding: Tensor,  # (B, C, h, w)
    size: tuple[int, int],
    weight: Tensor,
    bias: Tensor,
    ratio: float,
    primitives: ModuleType,
) -> Tensor:
    """What one scale adds to f_hat: phi of its codes at full size, (B, C, H, W)."""
    if tuple(embedding.shape[-2:]) != size:
        embedding = primitives.bicubic_upsample(embedding, size)
    return phi(embedding, weight, bias, ratio)


def residual_step(
    f_hat: Tensor,  # (B, C, H, W)
    embedding: Tensor,  # (B, C, h, w)
    phi_weight: Tensor,  # (C, C, 3, 3)
    phi_bias: Tensor,  # (C,)
    *,
    next_size: int | tuple[int, int] | None = None,
    ratio: float = 0.5,
    primitives: ModuleType = reference,
) -> tuple[Tensor, Tensor]:
    """f_hat plus phi of the upsampled codes, and its area-downsample at the next scale's size.

    `primitives` provides the interpolations: this package, or `var_ext.ops` with its kernels.
    """
    size = (f_hat.shape[2], f_hat.shape[3])
    f_hat = f_hat + upsampled_phi(embedding, size, phi_weight, phi_bias, ratio, primitives)
    return f_hat, f_hat if next_size is None else primitives.area_downsample(f_hat, next_size)
