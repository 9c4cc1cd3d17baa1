"""Adapters of low rank (LoRA, arXiv 2106.09685) by `peft`: small matrices A and B beside the linear layers of a trained
transformer are trained, and its own weights stay: W x + alpha / rank B A x.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from var_ext.checkpoints import lasting_name, save_adapter
from var_ext.checkpoints.adapter_entries import ADAPTER, merged, scale_of, without_adapters
from var_ext.models import VAR, VQVAE
from var_ext.models.modules import Dropout
from var_ext.training.extras import need
from var_ext.training.init_from import matching
from var_ext.training.recipes import VARRecipe
from var_ext.training.tokens import digest_of

CLASSES = "class_emb"  # the module that is trained as a whole where the classes are other ones


def add_adapters(var: VAR, recipe: VARRecipe, *, new_classes: bool) -> str:
    """Put adapters beside the linear layers that `recipe.lora_targets` name; nothing else is trained any more, but the
    class embeddings if the classes are other ones. B is zero: the model is the same as before.

    Args:
        var: with the weights of a trained model; changed in place.
        new_classes: the classes are not those of that model.

    Returns:
        A note of what is trained.

    Raises:
        ValueError: peft is missing, a pattern names no linear layer, or the rank is no smaller than a layer.
    """
    peft = _peft()
    config = lora_config(var, recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        peft.inject_adapter_in_model(peft.LoraConfig(**config), var, adapter_name=ADAPTER)
    if recipe.lora_dropout:
        for layer in var.modules():
            dropouts = getattr(layer, "lora_dropout", None)
            if dropouts is not None:  # peft's own would not depend on the row of the batch
                dropouts[ADAPTER] = Dropout(recipe.lora_dropout)
    if new_classes:
        var.class_emb.requires_grad_(True)
    trained = sum(p.numel() for p in var.parameters() if p.requires_grad)
    count = sum(p.numel() for p in var.parameters())
    beside = ", and the embeddings of other classes as a whole" if new_classes else ""
    return (
        f"adapters of rank {recipe.lora} beside {len(config['target_modules'])} linear layers are trained{beside}: "
        f"{trained:,} of {count:,} parameters"
    )


def lora_config(var: VAR, recipe: VARRecipe) -> dict[str, Any]:
    """Arguments of peft's LoraConfig, `target_modules` by their full names."""
    linear = {name: layer for name, layer in var.named_modules() if isinstance(layer, nn.Linear)}
    targets = matching(linear, recipe.lora_targets, "lora_targets", "linear layer")
    for name in targets:
        most = min(linear[name].weight.shape)
        if recipe.lora >= most:
            raise ValueError(
                f"lora must be below {most}, the smaller side of {name}, got {recipe.lora}: train the layer itself, or "
                "leave it out of lora_targets"
            )
    return {
        "r": recipe.lora, "lora_alpha": recipe.lora_alpha or recipe.lora, "lora_dropout": recipe.lora_dropout,
        "target_modules": targets,
    }  # fmt: skip


def check_adapter(var: VAR, source: VAR) -> None:
    """Refuse what would not come back when an adapter is put on its base model.

    Raises:
        ValueError: the scales or the tokenizer are not those of `source`.
    """
    (ours,), (theirs,) = var.vae_proxy, source.vae_proxy
    other = "scales" if var.schedule != source.schedule else "tokenizer" if _differs(ours, theirs) else None
    if other:
        raise ValueError(
            f"lora_save = adapter keeps the {other} of --init-from, got another: take lora_save = merged"
        )


def _differs(ours: VQVAE, theirs: VQVAE) -> bool:
    return ours is not theirs and digest_of(ours) != digest_of(theirs)


def whole_model(weights: Mapping[str, Tensor], recipe: VARRecipe) -> dict[str, Tensor]:
    """Weights of `VARTask` under the names of a plain transformer, with adapters merged into them."""
    if not recipe.lora:
        return dict(weights)
    base, adapter = without_adapters(weights)
    return merged(base, adapter, scale_of(recipe.lora, recipe.lora_alpha))


def save_lora(
    out: Path,
    var: VAR,
    weights: Mapping[str, Tensor],
    recipe: VARRecipe,
    source: str | Path,
    *,
    new_classes: bool,
    **own: Any,
) -> None:
    """Write the adapters alone, as peft does, for the model `source` that they were trained on.

    Args:
        var: plain, of the sizes of the training.
        weights: of `VARTask`.
        source: its name or folder.
        new_classes: whether the class embeddings were trained.
        own: `sampling`, `class_names` and `dtype`, as of `save_model`.

    Raises:
        CheckpointError: a file could not be written.
    """
    _, adapter = without_adapters(weights)
    config = {**lora_config(var, recipe), "base_model_name_or_path": lasting_name(source)}
    if new_classes:
        adapter[f"{CLASSES}.weight"] = weights[f"{CLASSES}.weight"]
        config["modules_to_save"] = [CLASSES]
    description = _peft().LoraConfig(**config, inference_mode=True).to_dict()
    save_adapter(out, adapter, description, num_classes=var.num_classes, **own)


def _peft() -> Any:
    return need("peft", "lora", "lora")
