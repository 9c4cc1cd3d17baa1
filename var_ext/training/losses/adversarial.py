"""Losses between a discriminator's logits, and the weight of the decoder's adversarial term (VQGAN, arXiv 2012.09841).

Logits are (B, ...), one or more an image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the discriminator on real and reconstructed images: 2 where it knows nothing, 0 where it has won."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def consistency_loss(logits: Tensor, again: Tensor) -> Tensor:
    """Mean squared difference between logits of images and of the same images augmented (bCR, arXiv 2002.04724)."""
    return F.mse_loss(again, logits)


def lecam_loss(real: Tensor, fake: Tensor, mean_real: float, mean_fake: float) -> Tensor:
    """LeCAM (arXiv 2104.03310, eq. 5): logits of one kind stay near the moving average of the other kind's."""
    return F.relu(real - mean_fake).square().mean() + F.relu(mean_real - fake).square().mean()


def last_gradients(distance: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """Gradients of the two terms at the last layer of the decoder: (2, *last.shape)."""
    terms = distance, adversarial
    return torch.stack([torch.autograd.grad(term, last, retain_graph=True)[0] for term in terms])


def adaptive_weight(gradients: Tensor, clamp: Sequence[float]) -> Tensor:
    """Ratio of the norms of `last_gradients`, so that neither term dominates (arXiv 2012.09841, eq. 7): ().

    Args:
        clamp: least and most of it.
    """
    least, most = clamp
    return (gradients[0].norm() / (gradients[1].norm() + EPS)).clamp(least, most).detach()
