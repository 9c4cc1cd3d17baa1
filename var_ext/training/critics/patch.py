"""PatchGAN (arXiv 1611.07004): a convolutional discriminator of overlapping patches."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """(B, 3, S, S) in [-1, 1] -> logits (B, 1, s, s), one per overlapping patch.

    Args:
        image_size: S, at least 8; small images get fewer levels than the usual three.
        ch: width of the first level.

    GroupNorm instead of BatchNorm: real and generated batches do not affect each other, nor do the rows of a batch, and
    several devices need no process group.
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
