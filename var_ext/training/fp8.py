"""An experiment: the products of the blocks' linear layers in 8-bit floats (arXiv 2209.05433), by `torchao`."""

from __future__ import annotations

import torch
from torch import nn

from var_ext.models import VAR
from var_ext.training.extras import need

CAPABILITY = (8, 9)  # of GPUs with such products
MULTIPLE = 16  # sides of a matrix that they take


def to_fp8(var: VAR, device: torch.device, *, emulate: bool = False) -> str:
    """Let attention and MLP of all blocks multiply in 8 bits; weights, gradients and their names stay as they are.

    A product rounds its inputs to e4m3 and gradients of outputs to e5m2, with a scale a tensor, and adds up in float32.

    Args:
        var: changed in place.
        device: where it will be trained.
        emulate: compute the same products in float32, from inputs rounded so: on any device, and slow.

    Returns:
        A note that it is an experiment.

    Raises:
        ValueError: torchao is missing, the device has no such products, or a side of a layer is no multiple of 16.
    """
    torchao = need("torchao.float8", "fp8", "fp8")
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY):
        has = device.type
        if has == "cuda":
            has = "{}, of capability {}.{}".format(
                torch.cuda.get_device_name(device), *torch.cuda.get_device_capability(device)
            )
        raise ValueError(
            f"fp8 needs a GPU of compute capability 8.9 or newer, got {has}: leave out --fp8; --fp8 emulated "
            "shows on any device what the rounding does, slowly"
        )
    layers = {name: layer for name, layer in var.named_modules() if _multiplies(name, layer)}
    for name, layer in layers.items():
        sides = tuple(layer.weight.shape)
        if any(side % MULTIPLE for side in sides):
            raise ValueError(
                f"fp8 needs layers whose sides are multiples of {MULTIPLE}, got {name} of {sides}"
            )
    # rows of a batch need not be a multiple of anything: they are padded
    settings = torchao.Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    torchao.convert_to_float8_training(var, module_filter_fn=lambda _, name: name in layers, config=settings)
    return (
        f"fp8 is an experiment: {len(layers)} linear layers multiply in 8 bits"
        f"{', emulated in float32' if emulate else ''}; compare the loss with a run without it"
    )


def _multiplies(name: str, layer: nn.Module) -> bool:
    """Attention and MLP: AdaLN has one row an image, embeddings and head decide tokens."""
    return isinstance(layer, nn.Linear) and name.startswith("blocks.") and ".ada_lin." not in name
