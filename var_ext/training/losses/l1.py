"""Absolute differences."""

from torch import Tensor
from torch.nn import functional as F


def l1_loss(output: Tensor, images: Tensor) -> Tensor:
    """Mean of |x - y| over all elements of (B, 3, S, S): ()."""
    return F.l1_loss(output, images)
