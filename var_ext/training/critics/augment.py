"""What a discriminator gets to see: moved, recoloured and cut out (DiffAugment, arXiv 2006.10738), blurred at first.

All of it is differentiable, so the decoder learns through it, and drawn by row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from var_ext.models.keyed import Draws

SHIFT = 0.125  # most that an image is moved, over its side


class DiffAugment(nn.Module):
    """(B, 3, S, S) in [-1, 1] -> the same, each row moved, recoloured and cut out with a probability each.

    Args:
        probability: of each of the three.
        cutout: side of the gray square, over S.
    """

    draws: Draws | None = None  # where the trainer keys the rows

    def __init__(self, probability: float, cutout: float) -> None:
        super().__init__()
        self.probability, self.cutout = probability, cutout

    def forward(self, images: Tensor) -> Tensor:
        if self.probability == 0:
            return images
        count, device = len(images), images.device
        drawn = self.draws.uniform(10) if self.draws else torch.rand(count, 10, device=device)
        chosen = (drawn[:, :3] < self.probability)[..., None, None, None]  # (B, 3, 1, 1, 1)
        images = torch.where(chosen[:, 0], moved(images, drawn[:, 3:5]), images)
        images = torch.where(chosen[:, 1], recoloured(images, drawn[:, 5:8]), images)
        return torch.where(chosen[:, 2], cut_out(images, drawn[:, 8:], self.cutout), images)


def moved(images: Tensor, drawn: Tensor) -> Tensor:
    """Moved by at most an eighth of the side, gray where nothing comes in; `drawn` (B, 2) in [0, 1)."""
    side = images.shape[-1]
    most = round(SHIFT * side)
    start = (drawn * (2 * most + 1)).long()  # (B, 2)
    return crop_at(F.pad(images, (most,) * 4), start, side)


def recoloured(images: Tensor, drawn: Tensor) -> Tensor:
    """Brightness, saturation and contrast changed; `drawn` (B, 3) in [0, 1)."""
    bright, colour, contrast = drawn[..., None, None, None].unbind(1)  # (B, 1, 1, 1) each
    images = images + bright - 0.5
    gray = images.mean(1, keepdim=True)
    images = (images - gray) * (2 * colour) + gray
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def cut_out(images: Tensor, drawn: Tensor, share: float) -> Tensor:
    """A gray square of `share` of the side anywhere, partly outside too; `drawn` (B, 2) in [0, 1)."""
    side = images.shape[-1]
    size = round(share * side)
    first = (drawn * (side + 1 - size % 2)).long() - size // 2  # (B, 2)
    place = torch.arange(side, device=images.device)
    inside = (place >= first[..., None]) & (place < first[..., None] + size)  # (B, 2, S)
    return images * ~(inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]


def crop_at(images: Tensor, start: Tensor, side: int) -> Tensor:
    """Squares (B, C, side, side) of images (B, C, H, W), each from its row and column in `start` (B, 2) int64."""
    place = start[..., None] + torch.arange(side, device=images.device)  # (B, 2, side)
    rows = place[:, 0, None, :, None].expand(-1, images.shape[1], -1, images.shape[3])
    columns = place[:, 1, None, None, :].expand(-1, images.shape[1], side, -1)
    return images.gather(2, rows).gather(3, columns)


def blurred(images: Tensor, amount: float) -> Tensor:
    """Blurred by a bell of width sqrt(S / 2) times `amount`, in [0, 1]; reflected at the borders."""
    width = (images.shape[-1] / 2) ** 0.5 * amount
    radius = math.floor(3 * width)
    if radius < 1:
        return images
    place = torch.arange(-radius, radius + 1, device=images.device)
    taps = torch.exp2(-(place / width).square())
    taps = (taps / taps.sum()).to(images.dtype)
    channels = images.shape[1]
    images = F.pad(images, (radius,) * 4, mode="reflect")
    images = F.conv2d(images, taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(images, taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
