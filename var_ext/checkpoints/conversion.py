"""Files of weights without a model folder: `.pth` of the published code, model.safetensors of the hub's mixin."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from var_ext.checkpoints.atomic import CheckpointError
from var_ext.checkpoints.find import find_model
from var_ext.checkpoints.model_folder import CONFIG, MIXIN_WEIGHTS, ModelFolder, Weights, open_folder
from var_ext.checkpoints.pth import read_pth, split
from var_ext.checkpoints.released import EVALUATION
from var_ext.checkpoints.saving import save_model
from var_ext.checkpoints.sizes import USAGE, deduce_vae, deduce_var
from var_ext.checkpoints.tensors import Entries, load_tensors
from var_ext.checkpoints.training_run import KEPT, LAST
from var_ext.models import VAR, VQVAE
from var_ext.paths import user_path

SAFETENSORS = ".safetensors"


def load_published(
    vae_file: str | os.PathLike[str],
    var_file: str | os.PathLike[str] | None = None,
    *,
    patch_nums: Sequence[int] | None = None,
    num_heads: int | None = None,
) -> tuple[VQVAE, VAR]:
    """Builds both models from files of the published code or the hub's mixin.

    Args and errors as in `open_files`, except that a tokenizer alone is a CheckpointError.
    """
    found = open_files(vae_file, var_file, patch_nums=patch_nums, num_heads=num_heads)
    if found.var_config is None:
        raise CheckpointError(
            f"{vae_file} has the entries of a tokenizer alone: give the file of the transformer too"
        )
    return found.models()


def convert(
    vae_file: str | os.PathLike[str],
    var_file: str | os.PathLike[str] | None,
    out_folder: str | os.PathLike[str],
    *,
    patch_nums: Sequence[int] | None = None,
    num_heads: int | None = None,
    class_names: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Turns files of the published code or the hub's mixin into a model folder (safetensors and JSON), or copies one.

    Args as in `open_files`; a tokenizer's file alone gives a tokenizer's folder. `class_names` and `dtype` as in
    `save_model`. `vae_file` alone may also be a model folder, that of a training run too, or one of a run's
    checkpoints, whose weights are those that would be kept if the run ended there.

    Raises:
        CheckpointError: a file cannot be read or used, or the folder cannot be written.
        ValueError: sizes are given for a folder, which has them, or one of adapters without their model.
    """
    first = user_path(vae_file)
    if var_file is None and (first.is_dir() or _is_of_a_run(first)):
        found = find_model(first if first.is_dir() else first.parent)
        found = found if first.is_dir() else found.at_checkpoint(first)
        class_names = found.class_names if class_names is None else class_names
        if patch_nums is not None or num_heads is not None:
            raise ValueError(
                f"patch_nums and num_heads are for files without a config; {found.source} has one"
            )
    else:
        found = open_files(vae_file, var_file, patch_nums=patch_nums, num_heads=num_heads)
    vae = found.tokenizer()
    var = None if found.var_config is None else found.transformer(vae)
    return save_model(out_folder, vae, var, sampling=found.sampling, class_names=class_names, dtype=dtype)


def _is_of_a_run(file: Path) -> bool:
    """Whether this is a checkpoint in the folder of a training run."""
    named = file.name == LAST or KEPT.fullmatch(file.name)
    return bool(named) and file.is_file() and (file.parent / CONFIG).is_file()


def open_files(
    vae_file: str | os.PathLike[str],
    var_file: str | os.PathLike[str] | None = None,
    *,
    patch_nums: Sequence[int] | None = None,
    num_heads: int | None = None,
) -> ModelFolder:
    """The models in one or two files. Sizes come from the shapes of the entries, and from config.json beside a
    model.safetensors.

    Args:
        vae_file: entries of the tokenizer, or the published trainer's checkpoint, which has both models.
        var_file: entries of the transformer, or such a checkpoint; None if `vae_file` has them.
        patch_nums, num_heads: only if the files do not determine them; see `deduce_var`.

    Raises:
        CheckpointError: a file is missing, damaged, carries code, or does not fit.
    """
    first = _read(vae_file)
    second = first if var_file is None else _read(var_file)
    if var_file is not None and second.var is None:
        raise CheckpointError(f"{var_file} must hold a transformer, but has the entries of a tokenizer alone")
    if first.vae is None:
        raise CheckpointError(f"{vae_file} must hold a tokenizer, but has the entries of a transformer alone")
    source, var_config = second.source, None
    if second.var is not None:
        given = {"patch_nums": patch_nums, "num_heads": num_heads}
        told = {**second.var_config, **{key: value for key, value in given.items() if value is not None}}
        hints = {key: told.get(key) for key in given}
        var_config = {**deduce_var(second.var, source, **hints), **told}
        patch_nums = var_config["patch_nums"]
    told = {**second.vae_config, **first.vae_config}  # a transformer's config describes its tokenizer too
    scales = patch_nums or told.get("v_patch_nums")
    vae_config = {**deduce_vae(first.vae, scales, first.source), **told}
    vae_config["v_patch_nums"] = scales = scales or vae_config["v_patch_nums"]
    entries = first.vae
    if len(entries[USAGE]) != len(scales):  # a tokenizer fits several schedules, its usage record only one
        entries = {**entries, USAGE: torch.zeros(len(scales), entries[USAGE].shape[1])}
    return ModelFolder(
        first.source,
        source,
        vae_config=vae_config,
        vae_weights=_at_hand(first.source, entries),
        var_config=var_config,
        var_weights=None if second.var is None else _at_hand(source, second.var),
        sampling={} if second.var is None else EVALUATION,
    )


def _at_hand(source: str, entries: Entries) -> Weights:
    return Weights(source, lambda: entries)


@dataclass(frozen=True)
class _Found:
    """The content of a file, and the arguments in the config beside it."""

    source: str
    vae: Entries | None
    var: Entries | None
    vae_config: Mapping[str, Any] = field(default_factory=dict)
    var_config: Mapping[str, Any] = field(default_factory=dict)


def _read(path: str | os.PathLike[str]) -> _Found:
    file = user_path(path)
    if file.suffix != SAFETENSORS:
        return _Found(str(file), *read_pth(file))
    vae, var = split(load_tensors(file), file)
    if file.name != MIXIN_WEIGHTS or not (file.parent / CONFIG).is_file():
        return _Found(str(file), vae, var)
    beside = open_folder(file.parent)
    beside.shapes()  # rejects arguments that build no model
    return _Found(str(file), vae, var, beside.vae_config, beside.var_config or {})
