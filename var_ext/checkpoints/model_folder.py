"""The model folder: config.json, vae.safetensors, var.safetensors, and a README.md that is the model card.

config.json holds {"format": "var_ext/1", "vae": arguments of VQVAE, "var": arguments of VAR, "sampling":
{"cfg", "top_k", "top_p"}, "class_names": [...] or null}; a folder with a tokenizer alone has neither "var"
nor var.safetensors. Entries keep their published names; they may be stored in half precision and are loaded
in fp32.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch

from var_ext.checkpoints.atomic import CheckpointError, load_tensors, read_json, save_tensors, write_json
from var_ext.models import VAR, VQVAE

FORMAT = "var_ext/1"
CONFIG, VAE_WEIGHTS, VAR_WEIGHTS = "config.json", "vae.safetensors", "var.safetensors"

# What a constructor makes of unfit arguments: torch refuses a negative size with a RuntimeError, an empty list of
# widths is an IndexError.
_UNFIT = (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError)


def save_model(
    folder: str | os.PathLike[str],
    vae: VQVAE,
    var: VAR | None = None,
    *,
    sampling: Mapping[str, float] | None = None,
    class_names: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a model folder that `load` gives back as it is. Each file is replaced as a whole, config.json last.

    Args:
        folder: made if it is missing.
        vae, var: the models; without `var` the folder holds a tokenizer alone.
        sampling: the recommended cfg, top_k and top_p.
        class_names: a name for each class of `var`.
        dtype: the floating-point type on disk; entries that would overflow in it stay as they are.

    Raises:
        CheckpointError: a file could not be written; those that were there are unchanged.
        ValueError: the number of class names is not the number of classes, or a model is not what its arguments build:
            with adapters, other layers or classes, attributes set later. The message names the part, and nothing is
            written.
    """
    if var is not None and class_names is not None and len(class_names) != var.num_classes:
        raise ValueError(f"class_names must have {var.num_classes} names, got {len(class_names)}")
    config: dict[str, Any] = {"format": FORMAT, "vae": vae.config}
    _check_rebuilds(vae, build_vae(vae.config, "the model"))
    if var is not None:
        # class embeddings may have been exchanged for others
        config["var"] = {**var.config, "num_classes": var.num_classes}
        _check_rebuilds(var, build_var(vae, config["var"], "the model"))
    path = Path(folder)
    save_tensors(path / VAE_WEIGHTS, _stored(vae, dtype), {"format": "pt"})
    if var is not None:
        save_tensors(path / VAR_WEIGHTS, _stored(var, dtype), {"format": "pt"})
    config["sampling"] = dict(sampling or {})
    config["class_names"] = None if class_names is None else list(class_names)
    write_json(path / CONFIG, config)
    return path


def _check_rebuilds(model: torch.nn.Module, twin: torch.nn.Module) -> None:
    """Raises if `model` is something else than `twin`, which was built from its arguments."""
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
    """Whether a subclass has something of its own in the place of what `base` has, but for its constructor."""
    if not issubclass(kind, base):
        return True
    own = (name for cls in kind.__mro__[: kind.__mro__.index(base)] for name in vars(cls))
    return any(not name.startswith("__") and hasattr(base, name) for name in own)


def _settings(module: torch.nn.Module | None) -> dict[str, object]:
    """What a part of a model was built with, besides weights."""
    if module is None:
        return {}
    state = ("training", "changes", "record_hit", "cond_drop_rate")
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


def read_config(folder: Path) -> dict[str, Any]:
    """Reads and checks config.json. Raises CheckpointError."""
    config: dict[str, Any] = read_json(folder / CONFIG)
    if config.get("format") != FORMAT:
        came = config.get("format", "none")
        raise CheckpointError(f'{folder / CONFIG} must have "format": "{FORMAT}", got {came!r}')
    for key, kind in (("vae", dict), ("var", dict), ("sampling", dict), ("class_names", list)):
        value = config.get(key)
        if not isinstance(value, kind) and (key == "vae" or value is not None):
            raise CheckpointError(f'"{key}" in {folder / CONFIG} must be a {kind.__name__}, got {value!r}')
    for key, value in (config.get("sampling") or {}).items():
        whole = key == "top_k"
        if type(value) is not int and (whole or type(value) is not float or not math.isfinite(value)):
            wanted = "a whole number" if whole else "a finite number"
            raise CheckpointError(
                f'"{key}" of "sampling" in {folder / CONFIG} must be {wanted}, got {value!r}'
            )
    for name in config.get("class_names") or []:
        if not isinstance(name, str):
            raise CheckpointError(
                f'"class_names" in {folder / CONFIG} must be a list of str, got {name!r} in it'
            )
    return config


def load_vae(folder: Path) -> VQVAE:
    """Loads the tokenizer of a model folder, on the CPU, in fp32 and ready for inference.

    Raises CheckpointError.
    """
    vae = build_vae(read_config(folder)["vae"], str(folder / CONFIG))
    fill(vae, load_tensors(folder / VAE_WEIGHTS), str(folder / VAE_WEIGHTS))
    return vae


def load_var(folder: Path, vae: VQVAE) -> VAR:
    """Loads the transformer of a model folder, on the CPU, in fp32 and ready for inference.

    Raises CheckpointError.
    """
    config = read_config(folder)
    if config.get("var") is None:
        raise CheckpointError(
            f"{folder} must hold a tokenizer and a transformer to draw images, but holds a tokenizer alone "
            f'(no "var" in {CONFIG})'
        )
    var = build_var(vae, config["var"], str(folder / CONFIG))
    fill(var, load_tensors(folder / VAR_WEIGHTS), str(folder / VAR_WEIGHTS))
    return var


def build_vae(config: Mapping[str, Any], source: str) -> VQVAE:
    """A VQVAE without storage (meta device), to be filled.

    Raises CheckpointError for arguments it does not take.
    """
    try:
        with torch.device("meta"):
            return VQVAE(**{**config, "test_mode": True})
    except _UNFIT as error:
        raise CheckpointError(f'"vae" of {source} must be arguments of VQVAE, but: {error}') from error


def build_var(vae: VQVAE, config: Mapping[str, Any], source: str) -> VAR:
    """A VAR without storage (meta device), to be filled.

    Raises CheckpointError for arguments it does not take.
    """
    try:
        with torch.device("meta"):
            return VAR(vae, **config).eval()
    except _UNFIT as error:
        raise CheckpointError(f'"var" of {source} must be arguments of VAR, but: {error}') from error


def fill(
    model: torch.nn.Module, entries: Mapping[str, torch.Tensor], source: str, *, cast: bool = True
) -> None:
    """Gives a model on the meta device its entries: all of them, none besides, each of its shape.

    Args:
        entries: name -> tensor; floating-point ones are brought to the model's dtype, others must have it.
        source: what to call the entries in an error.
        cast: False takes floating-point entries as they are: parameters are then shared with `entries`.

    Raises:
        CheckpointError: names the first entries that are missing, unexpected or of another shape or kind.
    """
    wanted = model.state_dict()
    faults = {
        "missing": [name for name in wanted if name not in entries],
        "unexpected": [name for name in entries if name not in wanted],
        "different": [
            f"{name} (wanted {tuple(wanted[name].shape)} {wanted[name].dtype}, "
            f"got {tuple(tensor.shape)} {tensor.dtype})"
            for name, tensor in entries.items()
            if name in wanted and not _fits(tensor, wanted[name])
        ],
    }
    if any(faults.values()):
        listed = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for kind, names in faults.items()
            if names
        )
        raise CheckpointError(
            f"{source} must have the {len(wanted)} entries of this {type(model).__name__}, but {listed}"
        )
    converted = {name: tensor.to(wanted[name].dtype) if cast else tensor for name, tensor in entries.items()}
    model.load_state_dict(converted, strict=True, assign=True)
    left = [n for n, t in itertools.chain(model.named_parameters(), model.named_buffers()) if t.is_meta]
    if left:
        raise CheckpointError(f"{source} left entries of {type(model).__name__} without values: {left[:3]}")


def _fits(tensor: torch.Tensor, wanted: torch.Tensor) -> bool:
    both_float = tensor.is_floating_point() and wanted.is_floating_point()
    return tensor.shape == wanted.shape and (both_float or tensor.dtype == wanted.dtype)
