"""Reconstruction and adversarial losses of the tokenizer (VQGAN family).

To try another discriminator, give `TokenizerTask` another module that maps images (B, 3, S, S) to logits of
any shape.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def reconstruction_loss(output: Tensor, images: Tensor, l1: float, l2: float) -> Tensor:
    """l1 |x - y| + l2 (x - y)^2, mean over all elements of (B, 3, S, S)."""
    return l1 * F.l1_loss(output, images) + l2 * F.mse_loss(output, images)


class PatchDiscriminator(nn.Module):
    """PatchGAN: (B, 3, S, S) in [-1, 1] -> logits (B, 1, s, s), one per overlapping patch.

    Args:
        image_size: S, at least 8; small images get fewer levels than the usual three.
        ch: width of the first level.

    GroupNorm instead of BatchNorm: real and generated batches do not affect each other, and several
    devices need no process group.
    """

    def __init__(self, image_size: int, ch: int = 64) -> None:
        super().__init__()
        if image_size < 8:
            raise ValueError(f"the discriminator takes images of at least 8 x 8 pixels, got {image_size}")
        layers = min(3, image_size.bit_length() - 3)
        widths = [min(ch * 2**i, ch * 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (a, b) in enumerate(pairwise(widths)):
            stride = 2 if i < layers - 1 else 1
            blocks += [
                nn.Conv2d(a, b, 4, stride, 1, bias=False),
                nn.GroupNorm(min(32, b), b),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.main(images)
        return logits


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the discriminator from its logits on real and reconstructed images."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def last_gradients(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """Gradients of the two terms at the last layer of the decoder: (2, *last.shape)."""
    terms = reconstruction, adversarial
    return torch.stack([torch.autograd.grad(term, last, retain_graph=True)[0] for term in terms])


def adaptive_weight(gradients: Tensor) -> Tensor:
    """Ratio of the norms of `last_gradients`, so that neither term dominates."""
    return (gradients[0].norm() / (gradients[1].norm() + 1e-4)).clamp(0, 1e4).detach()
