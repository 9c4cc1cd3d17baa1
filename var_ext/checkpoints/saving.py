"""Writes a model folder: only what `load` can restore exactly."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch

from var_ext.checkpoints.atomic import write_json
from var_ext.checkpoints.digests import digest_of_entries
from var_ext.checkpoints.model_folder import CONFIG, FORMAT, VAE_WEIGHTS, VAR_WEIGHTS, build_vae, build_var
from var_ext.checkpoints.tensors import DIGEST, save_tensors
from var_ext.models import VAR, VQVAE
from var_ext.paths import user_path


def save_model(
    folder: str | os.PathLike[str],
    vae: VQVAE,
    var: VAR | None = None,
    *,
    sampling: Mapping[str, float] | None = None,
    class_names: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    training: str | None = None,
) -> Path:
    """Writes a model folder that `load` restores exactly. Each file is replaced atomically, config.json last.

    Args:
        folder: created if missing.
        vae, var: the models; without `var` the folder has only a tokenizer.
        sampling: the recommended cfg, top_k and top_p.
        class_names: a name for each class of `var`.
        dtype: the floating-point type on disk; entries that would overflow in it keep theirs.
        training: name of the checkpoint in the folder that has the weights of `var`, or of `vae` if that is all; they
            are not written then.

    Raises:
        CheckpointError: a file could not be written; existing files are unchanged.
        ValueError: the number of class names is not the number of classes, or a model is not what its arguments build:
            with adapters, other layers or classes, attributes set later. The message names the part, and nothing is
            written.
    """
    if var is not None and class_names is not None and len(class_names) != var.num_classes:
        raise ValueError(f"class_names must have {var.num_classes} names, got {len(class_names)}")
    config: dict[str, Any] = {"format": FORMAT, "vae": vae.config}
    _check_rebuilds(vae, build_vae(vae.config, "the model"))
    if var is not None:
        # class embeddings may have been replaced
        config["var"] = {**var.config, "num_classes": var.num_classes}
        _check_rebuilds(var, build_var(vae, config["var"], "the model"))
    path = user_path(folder)
    trained = None if training is None else vae if var is None else var
    digests = {}
    for model, file in ((vae, VAE_WEIGHTS), (var, VAR_WEIGHTS)):
        if model is not None and model is not trained:
            entries = _stored(model, dtype)
            digests[file] = digest_of_entries(entries)
            save_tensors(path / file, entries, {"format": "pt", DIGEST: digests[file]})
    config["digests"] = digests
    config["sampling"] = dict(sampling or {})
    config["class_names"] = None if class_names is None else list(class_names)
    if training is not None:
        config["training"] = training
    write_json(path / CONFIG, config)
    return path


def _check_rebuilds(model: torch.nn.Module, twin: torch.nn.Module) -> None:
    """Raises if `model` differs from `twin`, which was built from its arguments."""
    fault = _difference(model, twin)
    if fault is not None:
        raise ValueError(
            f"a model folder holds the weights of a {type(twin).__name__} and its arguments, but {fault}: merge "
            "adapters first, or keep the state_dict with the code that builds the model"
        )


def _difference(model: torch.nn.Module, twin: torch.nn.Module) -> str | None:
    ours, theirs = dict(model.named_modules()), dict(twin.named_modules())
    for name, module in ours.items():
        part, other = name or "the model", theirs.get(name)
        kinds = [type(m).__name__ for m in (module, other)]
        if type(module) is not type(other) and (name or _overrides(type(module), type(other))):
            return f"{part} is a {kinds[0]}" + (
                f" instead of a {kinds[1]}" if other else ", which they do not build"
            )
        for key, value in module.__dict__.items():
            if isinstance(value, FunctionType | MethodType):
                return f"{part} has a {key} of its own"
        for key, value in _settings(other).items():
            if getattr(module, key, None) != value:
                return f"{part}.{key} is {getattr(module, key, None)!r} instead of {value!r}"
    missing = [name for name in theirs if name not in ours]
    if missing:
        return f"{missing[0]} is missing"
    entries = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, tensor in twin.state_dict().items():
        if entries.pop(name, None) != tuple(tensor.shape):
            return f"{name} does not have shape {tuple(tensor.shape)}"
    return f"{next(iter(entries))} is no entry of it" if entries else None


def _overrides(kind: type, base: type) -> bool:
    """Whether a subclass overrides something of `base` besides the constructor."""
    if not issubclass(kind, base):
        return True
    own = (name for cls in kind.__mro__[: kind.__mro__.index(base)] for name in vars(cls))
    return any(not name.startswith("__") and hasattr(base, name) for name in own)


def _settings(module: torch.nn.Module | None) -> dict[str, object]:
    """The construction arguments of a part of a model, besides weights."""
    if module is None:
        return {}
    # a transformer may be saved with another tokenizer of the same codes, such as one whose decoder was trained on
    state = ("training", "changes", "record_hit", "cond_drop_rate", "vae_proxy")
    return {
        key: value
        for key, value in module.__dict__.items()
        if type(value) in (int, float, bool, str, tuple) and not key.startswith("_") and key not in state
    }


def _stored(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    entries = {}
    for name, tensor in model.state_dict().items():
        small = tensor.to(dtype) if tensor.is_floating_point() else tensor
        entries[name] = small if torch.equal(small.isfinite(), tensor.isfinite()) else tensor
    return entries
