"""Squared differences."""

from torch import Tensor
from torch.nn import functional as F


def l2_loss(output: Tensor, images: Tensor) -> Tensor:
    """Mean of (x - y)^2 over all elements of (B, 3, S, S): ()."""
    return F.mse_loss(output, images)
