"""LPIPS (arXiv 1801.03924): a distance between the features of a frozen VGG16 or AlexNet; weights are a user's file.

The shift-tolerant kind (arXiv 2207.13686) has the same layers with strides behind a blur.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from var_ext.training.losses.perceptual import FrozenLoss

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of input in [-1, 1]
EPS = 1e-10

# net -> convolutions (channels, kernel) of each stage, whose last output is compared
STAGES: dict[str, list[list[tuple[int, int]]]] = {
    "vgg16": [[(64, 3)] * 2, [(128, 3)] * 2, [(256, 3)] * 3, [(512, 3)] * 3, [(512, 3)] * 3],
    "alex": [[(64, 11)], [(192, 5)], [(384, 3)], [(256, 3)], [(256, 3)]],
}
# (net, shift-tolerant) -> side of the smallest images that have a pixel left in every stage
SMALLEST = {("vgg16", False): 16, ("alex", False): 31, ("vgg16", True): 18, ("alex", True): 21}


class BlurPool(nn.Module):
    """Every second pixel of a blurred map (arXiv 1904.11486): (B, C, H, W) -> (B, C, H // 2 + 1, W // 2 + 1)."""

    taps: Tensor

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("taps", (row[:, None] * row)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
        return F.conv2d(padded, self.taps.expand(channels, 1, 3, 3), stride=2, groups=channels)


def _stage(net: str, index: int, channels: int, shift_tolerant: bool) -> Iterator[nn.Module]:
    """Layers of a stage that is given `channels`."""
    if index and (net == "vgg16" or index < 3):
        window = 2 if net == "vgg16" else 3
        yield nn.MaxPool2d(window, 1 if shift_tolerant else 2)
        if shift_tolerant:
            yield BlurPool()
    for width, kernel in STAGES[net][index]:
        large = kernel == 11
        stride = 4 if large and not shift_tolerant else 1
        yield nn.Conv2d(channels, width, kernel, stride, padding=2 if large else kernel // 2)
        if large and shift_tolerant:
            yield BlurPool()
        yield nn.ReLU(inplace=True)
        channels = width


class LPIPS(FrozenLoss):
    """LPIPS of (B, 3, S, S) in [-1, 1] and images: (B,) float32. Never trained; the images get no gradient.

    Args:
        net: "vgg16" or "alex".
        shift_tolerant: the kind with blurs.

    Raises:
        ValueError: of a call, images are too small for the network.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: str, *, shift_tolerant: bool = False) -> None:
        super().__init__()
        self.name = f"{'st' if shift_tolerant else ''}lpips-{net}"
        self.smallest = SMALLEST[net, shift_tolerant]
        widths = [stage[-1][0] for stage in STAGES[net]]
        self.stages = nn.ModuleList(
            nn.Sequential(*_stage(net, i, before, shift_tolerant))
            for i, (before, _) in enumerate(pairwise([3, *widths]))
        )
        self.heads = nn.ParameterList(torch.zeros(width) for width in widths)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.freeze()

    def convolutions(self) -> list[nn.Conv2d]:
        """All of the trunk, in order."""
        return [layer for layer in self.stages.modules() if isinstance(layer, nn.Conv2d)]

    def check_size(self, height: int, width: int, remedy: str = "") -> None:
        """ValueError, with `remedy` at its end, if the network has no pixel left of such images."""
        if min(height, width) < self.smallest:
            raise ValueError(
                f"{self.name} takes images of at least {self.smallest} x {self.smallest} pixels, got {height} x {width}"
                f"{remedy}"
            )

    def features(self, images: Tensor) -> list[Tensor]:
        """Of each stage, with a norm of 1 over the channels: (B, C, h, w)."""
        self.check_size(*images.shape[2:])
        x, found = (images - self.shift) / self.scale, []
        for stage in self.stages:
            x = stage(x)
            # the root has no gradient at 0, where a ReLU leaves nothing
            norm = x.square().sum(1, keepdim=True).clamp(min=EPS**2).sqrt()
            found.append(x / (norm + EPS))
        return found

    def compare(self, output: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(images)
        total = output.new_zeros(len(output))
        for head, a, b in zip(self.heads, self.features(output), wanted, strict=True):
            total = total + ((a - b).square() * head[:, None, None]).sum(1).mean((1, 2))
        return total
