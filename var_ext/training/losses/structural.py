"""A perceptual loss without weights: structural similarity at several scales, and a Laplacian pyramid."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from var_ext.training.losses.perceptual import FrozenLoss

WINDOW, SIGMA = 11, 1.5  # of SSIM
C1, C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # for pixels in [-1, 1]
SCALES = 5


class StructuralLoss(FrozenLoss):
    """Half of 1 - SSIM (Wang et al. 2004), mean over scales, and half of the differences of Laplacian bands.

    A scale has half the side of the one before; there are at most five, none with less than 11 pixels a side but the
    first. It is not LPIPS: it knows edges and textures, but no things.
    """

    name = "structural"

    def compare(self, output: Tensor, images: Tensor) -> Tensor:
        similarity, bands = [], output.new_zeros(len(output))
        for scale in range(SCALES):
            similarity.append(ssim(output, images))
            side = min(output.shape[2:]) // 2
            last = scale == SCALES - 1 or side < WINDOW
            # the last band is what is left, the others what halving loses
            halves = [F.avg_pool2d(x, 2) for x in (output, images)] if not last else []
            band = [
                x - F.interpolate(half, size=x.shape[2:], mode="bilinear") if halves else x
                for x, half in zip((output, images), halves or (output, images), strict=True)
            ]
            bands = bands + (band[0] - band[1]).abs().mean((1, 2, 3))
            if last:
                break
            output, images = halves
        return 0.5 * (1 - torch.stack(similarity).mean(0)) + 0.5 * bands


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity, mean over windows and channels, of (B, C, H, W) in [-1, 1]: (B,), at most 1."""
    window = min(WINDOW, *a.shape[2:])
    place = torch.arange(window, device=a.device) - (window - 1) / 2
    taps = torch.exp(-place.square() / (2 * SIGMA**2))
    taps = taps / taps.sum()
    # five moments of every window in one pass
    stack = torch.cat([a, b, a * a, b * b, a * b], dim=1)
    count = stack.shape[1]
    stack = F.conv2d(stack, taps.view(1, 1, -1, 1).expand(count, 1, -1, 1), groups=count)
    stack = F.conv2d(stack, taps.view(1, 1, 1, -1).expand(count, 1, 1, -1), groups=count)
    mean_a, mean_b, square_a, square_b, product = stack.chunk(5, dim=1)
    structure = (2 * (product - mean_a * mean_b) + C2) / (
        square_a - mean_a.square() + square_b - mean_b.square() + C2
    )
    luminance = (2 * mean_a * mean_b + C1) / (mean_a.square() + mean_b.square() + C1)
    return (luminance * structure).mean((1, 2, 3))
