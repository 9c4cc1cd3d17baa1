"""Reference of `cross_entropy`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Losses in nats: (..., V), (...) -> (...)."""
    flat = logits.reshape(-1, logits.shape[-1]), targets.flatten()
    return F.cross_entropy(*flat, reduction="none", label_smoothing=smoothing).view(targets.shape)
