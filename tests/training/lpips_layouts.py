"""Random weights of LPIPS, written in the layouts in which the real ones are published."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from var_ext.training.losses.lpips import LPIPS

FIRST = {
    "vgg16": (0, 4, 9, 16, 23),
    "alex": (0, 2, 5, 8, 10),
}  # place in `features` where each slice of lpips begins
# Places of convolutions: in torchvision's `features`, and in stlpips-pytorch, where blurs take places too.
PLACES = {"vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), "alex": (0, 3, 6, 8, 10)}
BLURRED = {"vgg16": (0, 2, 6, 8, 12, 14, 16, 20, 22, 24, 28, 30, 32), "alex": (0, 5, 9, 11, 13)}
FIRST_BLURRED = {"vgg16": (0, 4, 10, 18, 26), "alex": (0, 3, 7, 11, 13)}
BLURS = {
    "vgg16": ((5, 64), (11, 128), (19, 256), (27, 512)),
    "alex": ((1, 64), (4, 64), (8, 192)),
}  # place, channels


def slice_of(place: int, firsts: tuple[int, ...]) -> int:
    """Number, from 1, of the slice that has a place."""
    return sum(first <= place for first in firsts)


def randomised(net: str, *, shift_tolerant: bool = False) -> LPIPS:
    """LPIPS with weights that keep the size of features, and positive heads."""
    torch.manual_seed(1)
    loss = LPIPS(net, shift_tolerant=shift_tolerant)
    for layer in loss.convolutions():
        nn.init.kaiming_normal_(layer.weight)
        assert layer.bias is not None
        nn.init.normal_(layer.bias, std=0.1)
    for head in loss.heads:
        nn.init.uniform_(head)
    return loss


def trunk(loss: LPIPS, net: str, layout: str) -> dict[str, Tensor]:
    """Entries of the convolutions: layout "lpips", "vaex", "torchvision" or "stlpips"."""
    found = {}
    places, firsts = PLACES[net], FIRST[net]
    if layout == "stlpips":
        places, firsts = BLURRED[net], FIRST_BLURRED[net]
    for place, layer in zip(places, loss.convolutions(), strict=True):
        number = slice_of(place, firsts)
        if layout == "torchvision":
            name = f"features.{place}"
        elif layout == "vaex":
            name = f"net.slice{number}.{place - firsts[number - 1]}"
        else:
            name = f"net.slice{number}.{place}"
        assert layer.bias is not None
        found |= {f"{name}.weight": layer.weight.detach(), f"{name}.bias": layer.bias.detach()}
    if layout == "torchvision":
        found["classifier.0.weight"] = torch.zeros(2, 2)
    return found


def heads(loss: LPIPS, layout: str) -> dict[str, Tensor]:
    """Entries of the heads."""
    name = "lins.{}.model.1.weight" if layout == "vaex" else "lin{}.model.1.weight"
    return {name.format(k): head.detach()[None, :, None, None] for k, head in enumerate(loss.heads)}


def blurs(net: str) -> dict[str, Tensor]:
    """Entries of stlpips-pytorch beside the weights."""
    row = torch.tensor([1.0, 2.0, 1.0]) / 4
    taps = row[:, None] * row
    found = {
        f"net.slice{slice_of(place, FIRST_BLURRED[net])}.{place}.filt": taps.expand(width, 1, 3, 3).clone()
        for place, width in BLURS[net]
    }
    return found | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
