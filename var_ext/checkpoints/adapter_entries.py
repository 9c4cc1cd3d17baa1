"""Entries of adapters (LoRA, arXiv 2106.09685) beside those of a model, and the model with them merged in."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from var_ext.checkpoints.atomic import CheckpointError
from var_ext.checkpoints.tensors import Entries

ADAPTER = "default"  # the name that a model with adapters inside has for them
A, B = ".lora_A.weight", ".lora_B.weight"


def scale_of(rank: int, alpha: float) -> float:
    """Factor on the product of an adapter; an `alpha` of 0 is the rank."""
    return (alpha or rank) / rank


def without_adapters(entries: Mapping[str, Tensor]) -> tuple[Entries, Entries]:
    """Entries of a model with adapters inside -> its own, and the adapters', by `LAYER` + `A`, `B`."""
    base, adapter = {}, {}
    for name, tensor in entries.items():
        if name.endswith((f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight")):
            adapter[name.replace(f".{ADAPTER}.", ".")] = tensor
        else:
            base[name.replace(".base_layer.", ".")] = tensor
    return base, adapter


def merged(
    base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float, source: str = ""
) -> Entries:
    """W + scale B A of each layer with an adapter, in float32; other entries of `adapter` replace those of `base`.

    Raises:
        CheckpointError: an entry belongs to no layer, half an adapter is missing, or its shape does not fit; names
            `source`.
    """
    found = dict(base)
    for name, tensor in adapter.items():
        if name.endswith(B) and name.removesuffix(B) + A in adapter:
            continue
        if not name.endswith(A):
            if name not in found:
                raise CheckpointError(
                    f"{source} must have entries of this model and its adapters, got {name}"
                )
            found[name] = tensor
            continue
        layer = name.removesuffix(A)
        weight, up = found.get(f"{layer}.weight"), adapter.get(layer + B)
        if (
            weight is None
            or up is None
            or weight.shape != (len(up), tensor.shape[1])
            or len(tensor) != up.shape[1]
        ):
            shapes = [None if t is None else tuple(t.shape) for t in (weight, tensor, up)]
            raise CheckpointError(
                f"{source} must have lora_A (r, in) and lora_B (out, r) beside a weight (out, in) for {layer}, got "
                f"{shapes[1]}, {shapes[2]} and {shapes[0]}"
            )
        found[f"{layer}.weight"] = weight.float() + scale * (up.float() @ tensor.float())
    return found
