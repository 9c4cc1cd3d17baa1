"""The transformer of a recipe: its first weights, what of it is trained, and the folder that it ends in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from var_ext.checkpoints import ADAPTER_CONFIG, save_model
from var_ext.checkpoints.model_folder import VAE_WEIGHTS, VAR_WEIGHTS
from var_ext.models import VAR, VQVAE
from var_ext.training.fp8 import to_fp8
from var_ext.training.init_from import freeze, init_from
from var_ext.training.lora import add_adapters, check_adapter, save_lora, whole_model
from var_ext.training.recipes import VARRecipe


def build_network(recipe: VARRecipe, vae: VQVAE, num_classes: int) -> VAR:
    """The transformer in the sizes of a recipe, on the scales of a tokenizer, as its constructor makes it."""
    return VAR(
        vae, num_classes=num_classes, depth=recipe.depth, embed_dim=recipe.embed_dim,
        num_heads=recipe.num_heads, mlp_ratio=recipe.mlp_ratio, drop_rate=recipe.drop_rate,
        drop_path_rate=recipe.drop_path_rate, shared_aln=recipe.shared_aln,
        cond_drop_rate=recipe.cond_drop_rate, attn_l2_norm=recipe.attn_l2_norm,
        patch_nums=vae.schedule.patch_nums,
    )  # fmt: skip


def first_network(
    recipe: VARRecipe, vae: VQVAE, num_classes: int, source: VAR | None = None
) -> tuple[VAR, list[str]]:
    """The transformer with its first weights: random ones of the recipe's seed, or those of `source`.

    Returns:
        It, and a sentence for each thing that was not copied from `source` as it is.

    Raises:
        ValueError: `source` has other sizes, or one that an adapter cannot be put back on.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        var = build_network(recipe, vae, num_classes)
        var.init_weights(
            init_adaln=recipe.init_adaln,
            init_adaln_gamma=recipe.init_adaln_gamma,
            init_head=recipe.init_head,
            init_std=-1,  # sqrt(1 / (3 C))
        )
    if source is None:
        return var, []
    notes = init_from(var, source)
    if recipe.lora_save == "adapter":
        check_adapter(var, source)
    return var, notes


def other_classes(ours: Sequence[str], count: int, theirs: Sequence[str] | None) -> bool:
    """Whether classes with the names `ours` are other ones than `count` with the names `theirs`, None if unknown."""
    return len(ours) != count or (theirs is not None and list(ours) != list(theirs))


def prepare_network(
    var: VAR, recipe: VARRecipe, device: torch.device, *, new_classes: bool | None = None
) -> list[str]:
    """What a recipe makes of a transformer that has its first weights: adapters, frozen parameters, 8-bit products.

    Args:
        device: where it will be trained.
        new_classes: whether the classes are other ones than those of the model that the weights are from, None where
            there is none.

    Returns:
        A sentence for each thing that the user has to know.

    Raises:
        ValueError: a pattern names nothing, adapters have no trained model below them, or 8 bits do not work here.
    """
    notes = []
    if recipe.lora:
        if new_classes is None:
            raise ValueError(
                "lora trains adapters of a trained model, got none: name it with --init-from NAME"
            )
        notes.append(add_adapters(var, recipe, new_classes=new_classes))
    if recipe.freeze:
        freeze(var, recipe.freeze)
    if recipe.fp8 != "none":
        notes.append(to_fp8(var, device, emulate=recipe.fp8 == "emulated"))
    var.activation_checkpointing = recipe.activation_checkpointing
    return notes


def save_network(
    out: Path,
    weights: Mapping[str, Tensor],
    recipe: VARRecipe,
    vae: VQVAE,
    class_names: Sequence[str],
    *,
    source: str | Path | None,
    new_classes: bool,
) -> None:
    """Write finished weights as a model folder, or as the adapters that the recipe asks for.

    Args:
        weights: by the names of a prepared network, on the CPU.
        source: name or folder of the model that it began with.
        new_classes: whether class embeddings were trained beside adapters.

    Raises:
        CheckpointError: a file could not be written.
    """
    dtype = torch.float16 if recipe.half else torch.float32
    own: dict[str, Any] = {"sampling": sampling_of(recipe), "class_names": class_names, "dtype": dtype}
    if recipe.lora_save == "adapter" and source is not None:
        for file in (VAE_WEIGHTS, VAR_WEIGHTS):  # of the run, and of an earlier end: adapters have none
            (out / file).unlink(missing_ok=True)
        plain = plain_network(recipe, vae, len(class_names))
        save_lora(out, plain, weights, recipe, source, new_classes=new_classes, **own)
        return
    (out / ADAPTER_CONFIG).unlink(missing_ok=True)  # of an earlier end: the folder would be read as adapters
    save_model(out, vae, plain_network(recipe, vae, len(class_names), weights), **own)


def publish_network(
    out: Path, checkpoint: str, recipe: VARRecipe, vae: VQVAE, class_names: Sequence[str]
) -> None:
    """Make the folder of a run a model folder, whose transformer has the weights of a checkpoint in it.

    Raises:
        CheckpointError: a file could not be written.
    """
    (out / ADAPTER_CONFIG).unlink(missing_ok=True)  # of an earlier end
    plain = plain_network(recipe, vae, len(class_names))
    save_model(out, vae, plain, sampling=sampling_of(recipe), class_names=class_names, training=checkpoint)


def plain_network(
    recipe: VARRecipe, vae: VQVAE, num_classes: int, weights: Mapping[str, Tensor] | None = None
) -> VAR:
    """A transformer without adapters, ready for inference: with these weights of a prepared network, which it shares,
    or without storage."""
    with torch.device("meta"):
        var = build_network(recipe, vae, num_classes)
    if weights is not None:
        var.load_state_dict(whole_model(weights, recipe), assign=True)
    return var.eval()


def sampling_of(recipe: VARRecipe) -> dict[str, float]:
    """What the finished model recommends."""
    return {"cfg": recipe.cfg, "top_k": recipe.top_k, "top_p": recipe.top_p}
