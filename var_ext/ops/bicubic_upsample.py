"""Bicubic interpolation of codes to the full grid."""

from __future__ import annotations

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._interpolation import checked_size, register_interpolation

register_interpolation("bicubic_upsample", reference.bicubic_upsample)


def bicubic_upsample(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Upsample with the cubic convolution kernel, a = -0.75 (paper, Algorithm 1 and 2, `interpolate`).

    Pixel centres lie at half-integers (align_corners=False), there is no antialiasing, and borders repeat.

    Args:
        x: (B, C, h, w), float32, bfloat16, float16 or float64, any strides.
        size: side, or (H, W).

    Returns:
        (B, C, H, W), dtype of x, channels-last where x is, else contiguous. Sums are taken in float32
        (float64 for float64).

    Raises:
        ValueError: x is not four-dimensional, or a size is below 1, or above 16384 on CUDA.
        TypeError: dtype not supported.
    """
    h, w = checked_size("bicubic_upsample", x, size)
    if backend.current() == "reference":
        return reference.bicubic_upsample(x, (h, w))
    return torch.ops.var_ext.bicubic_upsample.default(x, h, w)
