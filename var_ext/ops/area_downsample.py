"""Area interpolation: the mean over each output cell."""

from __future__ import annotations

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._interpolation import checked_size, register_interpolation

register_interpolation("area_downsample", reference.area_downsample)


def area_downsample(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Downsample by the mean over the area that each output cell covers (paper, Algorithm 1, `interpolate`).

    Cell i of h along an axis of length H is the mean of the entries from floor(i H / h) to ceil((i + 1) H / h).

    Args:
        x: (B, C, H, W), float32, bfloat16, float16 or float64, any strides.
        size: side, or (h, w).

    Returns:
        (B, C, h, w), dtype of x, channels-last where x is, else contiguous. Sums are taken in float32
        (float64 for float64).

    Raises:
        ValueError: x is not four-dimensional, or a size is below 1, or above 16384 on CUDA.
        TypeError: dtype not supported.
    """
    h, w = checked_size("area_downsample", x, size)
    if backend.current() == "reference":
        return reference.area_downsample(x, (h, w))
    return torch.ops.var_ext.area_downsample.default(x, h, w)
