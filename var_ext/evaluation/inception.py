"""The Inception network of FID: of 2015-12-05, with the entry names of torch-fidelity's file, and its resize.

It is no torchvision model: averages leave padding out, the last block pools by the maximum, there are 1008 classes, and
images are resized as TensorFlow 1 did. Architecture: arXiv 1512.00567, figures 5 to 7, and the published graph.
"""

from __future__ import annotations

import copy
import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 299  # of what the network sees
POOL, CLASSES = 2048, 1008
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 17
SPATIAL = SPATIAL_CHANNELS * SPATIAL_SIDE**2  # 2023
EPS = 1e-3  # of the norms

# Steps of a branch: a unit's name, a pooling, or units side by side on the same input.
AVERAGE, MAXIMUM, HALVE = "average", "maximum", "halve"
Step = str | tuple[str, ...]
# name -> (channels in, out, kernel (height, width), stride)
Units = dict[str, tuple[int, int, tuple[int, int], int]]


def resize_like_tf1(images: Tensor, side: int = SIDE) -> Tensor:
    """Bilinear, output pixel i at input pixel i * in / out: no offset of half a pixel, no antialiasing.

    As `tf.image.resize_bilinear` of TensorFlow 1 without `align_corners`; places are computed in float32 as there.
    OpenAI's torch port resizes by grid_sample, whose places round worse (at 299 px, where nothing is to be done, by up
    to 0.007 of 255): that moves spatial features by up to 2.2e-5; from equal pixels both networks give equal ones.

    Args:
        images: (B, C, H, W) floats.

    Returns:
        (B, C, side, side), dtype of `images`.
    """
    for axis in (3, 2):
        length = images.shape[axis]
        scale = torch.tensor(length / side, dtype=torch.float32, device=images.device)
        place = torch.arange(side, dtype=torch.float32, device=images.device) * scale
        low = place.long().clamp_max(length - 1)
        share = (place - low).to(images.dtype)
        if axis == 2:
            share = share[:, None]
        first = images.index_select(axis, low)
        images = first + (images.index_select(axis, (low + 1).clamp_max(length - 1)) - first) * share
    return images


class Unit(nn.Module):
    """Convolution, norm, ReLU: (B, in, H, W) -> (B, out, H', W'). 'Same' padding unless it has a stride or says so."""

    def __init__(
        self, channels: int, out: int, kernel: tuple[int, int], stride: int = 1, padded: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(out, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self, dtype: torch.dtype) -> None:
        """Takes the norm into the convolution, computed in float64, and casts it; entries are others afterwards."""
        bn = self.bn
        assert isinstance(bn, nn.BatchNorm2d) and bn.running_var is not None and bn.running_mean is not None
        scale = bn.weight.double() / (bn.running_var.double() + EPS).sqrt()
        weight = self.conv.weight.double() * scale[:, None, None, None]
        self.conv.bias = nn.Parameter(
            (bn.bias.double() - bn.running_mean.double() * scale).to(dtype), requires_grad=False
        )
        weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        self.conv.weight = nn.Parameter(weight, requires_grad=False)
        self.bn = nn.Identity()


class Mixed(nn.Module):
    """Branches on one input, their channels side by side: (B, in, H, W) -> (B, sum of out, H', W')."""

    def __init__(self, units: Units, branches: tuple[tuple[Step, ...], ...]) -> None:
        super().__init__()
        for name, unit in units.items():
            self.add_module(name, Unit(*unit))
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for branch in self.branches:
            h = x
            for step in branch:
                h = self._step(step, h)
            found.append(h)
        return torch.cat(found, 1)

    def _step(self, step: Step, x: Tensor) -> Tensor:
        if isinstance(step, tuple):
            return torch.cat([self._step(each, x) for each in step], 1)
        if step == AVERAGE:
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        if step == MAXIMUM:
            return F.max_pool2d(x, 3, 1, 1)
        if step == HALVE:
            return F.max_pool2d(x, 3, 2)
        return self.get_submodule(step)(x)


def _block35(channels: int, pooled: int) -> Mixed:
    units: Units = {
        "branch1x1": (channels, 64, (1, 1), 1),
        "branch5x5_1": (channels, 48, (1, 1), 1),
        "branch5x5_2": (48, 64, (5, 5), 1),
        "branch3x3dbl_1": (channels, 64, (1, 1), 1),
        "branch3x3dbl_2": (64, 96, (3, 3), 1),
        "branch3x3dbl_3": (96, 96, (3, 3), 1),
        "branch_pool": (channels, pooled, (1, 1), 1),
    }
    return Mixed(
        units,
        (
            ("branch1x1",),
            ("branch5x5_1", "branch5x5_2"),
            ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
            (AVERAGE, "branch_pool"),
        ),
    )


def _to_17(channels: int) -> Mixed:
    units: Units = {
        "branch3x3": (channels, 384, (3, 3), 2),
        "branch3x3dbl_1": (channels, 64, (1, 1), 1),
        "branch3x3dbl_2": (64, 96, (3, 3), 1),
        "branch3x3dbl_3": (96, 96, (3, 3), 2),
    }
    return Mixed(units, (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"), (HALVE,)))


def _block17(channels: int, inner: int) -> Mixed:
    wide, tall, one = (1, 7), (7, 1), (1, 1)
    units: Units = {
        "branch1x1": (channels, 192, one, 1),
        "branch7x7_1": (channels, inner, one, 1),
        "branch7x7_2": (inner, inner, wide, 1),
        "branch7x7_3": (inner, 192, tall, 1),
        "branch7x7dbl_1": (channels, inner, one, 1),
        "branch7x7dbl_2": (inner, inner, tall, 1),
        "branch7x7dbl_3": (inner, inner, wide, 1),
        "branch7x7dbl_4": (inner, inner, tall, 1),
        "branch7x7dbl_5": (inner, 192, wide, 1),
        "branch_pool": (channels, 192, one, 1),
    }
    return Mixed(
        units,
        (
            ("branch1x1",),  # the first channels: those of the spatial features
            tuple(f"branch7x7_{i}" for i in range(1, 4)),
            tuple(f"branch7x7dbl_{i}" for i in range(1, 6)),
            (AVERAGE, "branch_pool"),
        ),
    )


def _to_8(channels: int) -> Mixed:
    units: Units = {
        "branch3x3_1": (channels, 192, (1, 1), 1),
        "branch3x3_2": (192, 320, (3, 3), 2),
        "branch7x7x3_1": (channels, 192, (1, 1), 1),
        "branch7x7x3_2": (192, 192, (1, 7), 1),
        "branch7x7x3_3": (192, 192, (7, 1), 1),
        "branch7x7x3_4": (192, 192, (3, 3), 2),
    }
    return Mixed(
        units,
        (("branch3x3_1", "branch3x3_2"), tuple(f"branch7x7x3_{i}" for i in range(1, 5)), (HALVE,)),
    )


def _block8(channels: int, pooling: str) -> Mixed:
    wide, tall, one = (1, 3), (3, 1), (1, 1)
    units: Units = {
        "branch1x1": (channels, 320, one, 1),
        "branch3x3_1": (channels, 384, one, 1),
        "branch3x3_2a": (384, 384, wide, 1),
        "branch3x3_2b": (384, 384, tall, 1),
        "branch3x3dbl_1": (channels, 448, one, 1),
        "branch3x3dbl_2": (448, 384, (3, 3), 1),
        "branch3x3dbl_3a": (384, 384, wide, 1),
        "branch3x3dbl_3b": (384, 384, tall, 1),
        "branch_pool": (channels, 192, one, 1),
    }
    return Mixed(
        units,
        (
            ("branch1x1",),
            ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
            ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),
            (pooling, "branch_pool"),
        ),
    )


class InceptionV3(nn.Module):
    """The network of FID. Entries have torch-fidelity's names; weights are given by `inception_weights`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, (3, 3), 2)
        self.Conv2d_2a_3x3 = Unit(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = Unit(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Unit(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Unit(80, 192, (3, 3), padded=False)
        self.Mixed_5b = _block35(192, 32)
        self.Mixed_5c = _block35(256, 64)
        self.Mixed_5d = _block35(288, 64)
        self.Mixed_6a = _to_17(288)
        self.Mixed_6b = _block17(768, 128)
        self.Mixed_6c = _block17(768, 160)
        self.Mixed_6d = _block17(768, 160)
        self.Mixed_6e = _block17(768, 192)
        self.Mixed_7a = _to_8(768)
        self.Mixed_7b = _block8(1280, AVERAGE)
        self.Mixed_7c = _block8(2048, MAXIMUM)
        self.fc = nn.Linear(POOL, CLASSES)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> InceptionV3:
        """Frozen: stays in evaluation mode."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features that FID and sFID are of.

        Args:
            pixels: (B, 3, H, W) uint8, or floats in [0, 255].

        Returns:
            pool: (B, 2048) float32, means over the last 8 x 8 maps.
            spatial: (B, 2023) float32, the first 7 channels of `Mixed_6d`, in the order (place, channel).
        """
        x = (resize_like_tf1(pixels.float()) - 128) / 128  # (B, 3, 299, 299)
        first = self.Conv2d_1a_3x3.conv.weight
        channels_last = first.is_contiguous(memory_format=torch.channels_last)
        x = x.to(first.dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).float().flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B, 2048, 8, 8)
        return x.float().mean((2, 3)), spatial

    def logits(self, pool: Tensor) -> Tensor:
        """(B, 2048) -> (B, 1008) float32, without the bias, as the Inception Score is computed."""
        return pool.float() @ self.fc.weight.float().T

    def folded(self, dtype: torch.dtype = torch.float32) -> InceptionV3:
        """A copy to be run: norms taken into the convolutions, channels last, convolutions in `dtype`."""
        fast = copy.deepcopy(self)
        for module in fast.modules():
            if isinstance(module, Unit):
                module.fold(dtype)
        return fast

    def digest(self) -> str:
        """Hex digest of the weights, the same from whichever of the three kinds of file they were read."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            if not name.endswith("num_batches_tracked"):
                found.update(f"{name} {tuple(tensor.shape)}".encode())
                found.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()
