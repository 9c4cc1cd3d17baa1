"""The model folder, as one value: the config, read and checked once, and the paths of the weights.

A folder of this project: config.json, vae.safetensors, var.safetensors, and a README.md that is the model card.
config.json holds {"format": "var_ext/1", "vae": arguments of VQVAE, "var": arguments of VAR, "sampling":
{"cfg", "top_k", "top_p"}, "class_names": [...] or null}; a folder with only a tokenizer has neither "var"
nor var.safetensors. Entries keep their published names; they may be stored in half precision and are loaded
in fp32. "digests" holds what each file of weights says of itself, so that a folder whose writer was stopped between
two files is not taken for a model. While a run trains the last of the two models, "training" names the checkpoint that
has its weights.

A folder of the hub's mixin, as `VQVAEHF` and `VARHF` save it: the constructor's arguments as config.json, and
model.safetensors.
"""

from __future__ import annotations

import inspect
import itertools
import math
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from var_ext.checkpoints.arguments import check_vae, check_var
from var_ext.checkpoints.atomic import CheckpointError, first_line, listed, read_json
from var_ext.checkpoints.pth import GO_ON
from var_ext.checkpoints.tensors import Entries, load_entries
from var_ext.checkpoints.training_run import KEPT, LAST, LOG, kept_weights
from var_ext.models import VAR, VQVAE

FORMAT = "var_ext/1"
CONFIG, VAE_WEIGHTS, VAR_WEIGHTS = "config.json", "vae.safetensors", "var.safetensors"
MIXIN_WEIGHTS = "model.safetensors"
RUN = {LAST, LOG}  # what a training run writes to its folder

# What a constructor raises for unfit arguments: torch refuses a negative size with a RuntimeError, an empty list of
# widths is an IndexError.
_UNFIT = (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError)


@dataclass(frozen=True)
class Weights:
    """Entries in a file that is read, or fetched from the hub, only when needed.

    Attributes:
        source: the file's name in messages.
        read: returns the entries under plain names. Raises CheckpointError.
    """

    source: str
    read: Callable[[], Entries]


@dataclass(frozen=True)
class ModelFolder:
    """What a model is built from. The config is read and checked; weights are read by the methods, once each.

    Attributes:
        source: the folder's name in messages: a path or an address.
        config_name: the name of its config file in messages.
        vae_config: arguments of `VQVAE`.
        vae_weights: None if there are none: the folder of a `VARHF` has only a transformer.
        var_config, var_weights: of `VAR`; None if there is only a tokenizer.
        sampling: recommended cfg, top_k and top_p.
        class_names: a name per class, or None.
        training: the checkpoint that has the weights of a run that is not done, or None.
    """

    source: str
    config_name: str
    vae_config: Mapping[str, Any]
    vae_weights: Weights | None
    var_config: Mapping[str, Any] | None = None
    var_weights: Weights | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    class_names: Sequence[str] | None = None
    training: str | None = None

    def at_checkpoint(self, file: Path) -> ModelFolder:
        """The same with the weights of a checkpoint of its training, of the last of its models."""
        weights = Weights(str(file), lambda: kept_weights(file))
        if self.var_config is None:
            return replace(self, vae_weights=weights)
        return replace(self, var_weights=weights)

    def shapes(self) -> tuple[VQVAE, VAR | None]:
        """The models without storage (meta device). Raises CheckpointError."""
        vae = build_vae(self.vae_config, self.config_name)
        return vae, None if self.var_config is None else build_var(vae, self.var_config, self.config_name)

    def tokenizer(self) -> VQVAE:
        """The tokenizer on the CPU, in fp32 and ready for inference. Raises CheckpointError."""
        if self.vae_weights is None:
            there = os.path.isdir(self.source)
            fetched = (
                "" if there else f" (`hf download {'/'.join(self.source.split('/')[-2:])} --local-dir DIR`)"
            )
            raise CheckpointError(
                f"{self.source} holds the transformer of a VARHF, which is saved without its tokenizer: with the "
                f"tokenizer's file, `var-ext convert TOKENIZER {self.source if there else 'DIR'}/{MIXIN_WEIGHTS} --out "
                f"FOLDER`{fetched} makes a model folder of both that load() takes"
            )
        vae = build_vae(self.vae_config, self.config_name)
        fill(vae, self.vae_weights.read(), self.vae_weights.source)
        return vae

    def transformer(self, vae: VQVAE) -> VAR:
        """The transformer on `vae`, on the CPU, in fp32 and ready for inference. Raises CheckpointError."""
        if self.var_config is None or self.var_weights is None:
            raise CheckpointError(
                f"{self.source} must hold a tokenizer and a transformer to draw images, but holds a tokenizer alone"
            )
        var = build_var(vae, self.var_config, self.config_name)
        fill(var, self.var_weights.read(), self.var_weights.source)
        check_levels(var, self.var_weights.source)
        return var

    def models(self) -> tuple[VQVAE, VAR]:
        """Both models, on the CPU, in fp32 and ready for inference. Raises CheckpointError."""
        vae = self.tokenizer()
        return vae, self.transformer(vae)


def open_folder(path: Path) -> ModelFolder:
    """Reads config.json of a folder on this disk, and nothing else.

    Raises:
        CheckpointError: it is missing or describes no model; suggests a command for other files found there.
    """
    if not os.path.exists(path / CONFIG):
        names = listed(path)
        if set(names) >= RUN:
            raise CheckpointError(
                f"{path} holds no {CONFIG} but a training run without a checkpoint yet, or of an older version: {GO_ON}"
            )
        files = [name for name in names if name.endswith((".pth", ".pt", ".ckpt", ".safetensors"))]
        if files:
            raise CheckpointError(
                f"{path} holds no {CONFIG} but {', '.join(files[:3])}{', ...' if files[3:] else ''}: "
                "`var-ext convert TOKENIZER TRANSFORMER --out FOLDER` makes a model folder of such files"
            )
    return parse(read_json(path / CONFIG), str(path), lambda file: path / file)


def parse(config: Mapping[str, Any], source: str, locate: Callable[[str], Path]) -> ModelFolder:
    """A model folder from the content of its config.json.

    Args:
        source: the folder's name in errors.
        locate: returns the path of a file in it, fetched if need be.

    Raises:
        CheckpointError: the config does not describe a model.
    """

    digests: Mapping[str, Any] = {}  # folders of others have none

    def weights(file: str) -> Weights:
        return Weights(f"{source}/{file}", lambda: load_entries(locate(file), digests.get(file)))

    name = f"{source}/{CONFIG}"
    if "format" not in config and "vae_kwargs" in config:
        _check_kinds(config, {"vae_kwargs": dict}, name)
        var_config = {key: value for key, value in config.items() if key != "vae_kwargs"}
        return ModelFolder(source, name, config["vae_kwargs"], None, var_config, weights(MIXIN_WEIGHTS))
    if config and config.keys() <= inspect.signature(VQVAE).parameters.keys():
        return ModelFolder(source, name, config, weights(MIXIN_WEIGHTS))
    _check(config, name)
    digests = config.get("digests") or {}
    has_var = config.get("var") is not None
    found = ModelFolder(
        source,
        name,
        vae_config=config["vae"],
        vae_weights=weights(VAE_WEIGHTS),
        var_config=config["var"] if has_var else None,
        var_weights=weights(VAR_WEIGHTS) if has_var else None,
        sampling=config.get("sampling") or {},
        class_names=config.get("class_names"),
        training=config.get("training"),
    )
    return found if found.training is None else found.at_checkpoint(locate(found.training))


def _check(config: Mapping[str, Any], name: str) -> None:
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f'{name} must have "format": "{FORMAT}", got {reprlib.repr(config.get("format", "none"))}'
        )
    _check_kinds(config, {"vae": dict}, name)
    optional = {"var": dict, "sampling": dict, "class_names": list, "training": str, "digests": dict}
    _check_kinds(config, {key: kind for key, kind in optional.items() if config.get(key) is not None}, name)
    for key, value in (config.get("sampling") or {}).items():
        whole = key == "top_k"
        if type(value) is not int and (whole or type(value) is not float or not math.isfinite(value)):
            wanted = "a whole number" if whole else "a finite number"
            raise CheckpointError(
                f'"{key}" of "sampling" in {name} must be {wanted}, got {reprlib.repr(value)}'
            )
    training = config.get("training")
    if training is not None and training != LAST and not KEPT.fullmatch(training):
        raise CheckpointError(
            f'"training" in {name} must be a checkpoint in its folder, {LAST}, got {training!r}'
        )
    for class_name in config.get("class_names") or []:
        if not isinstance(class_name, str):
            raise CheckpointError(
                f'"class_names" in {name} must be a list of str, got {reprlib.repr(class_name)} in it'
            )


def _check_kinds(config: Mapping[str, Any], kinds: Mapping[str, type], name: str) -> None:
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind):
            raise CheckpointError(
                f'"{key}" in {name} must be a {kind.__name__}, got {reprlib.repr(config.get(key))}'
            )


def build_vae(config: Mapping[str, Any], source: str) -> VQVAE:
    """A VQVAE without storage (meta device), to be filled.

    Raises CheckpointError for arguments it does not take.
    """
    try:
        check_vae(config)
        with torch.device("meta"):
            return VQVAE(**{**config, "test_mode": True}).float()  # whatever torch's default dtype
    except _UNFIT as error:
        raise CheckpointError(
            f'"vae" of {source} must be arguments of VQVAE, but: {first_line(error)}'
        ) from error


def build_var(vae: VQVAE, config: Mapping[str, Any], source: str) -> VAR:
    """A VAR without storage (meta device), to be filled.

    Raises CheckpointError for arguments it does not take.
    """
    try:
        check_var(config)
        with torch.device("meta"):
            return VAR(vae, **config).float().eval()
    except _UNFIT as error:
        raise CheckpointError(
            f'"var" of {source} must be arguments of VAR, but: {first_line(error)}'
        ) from error


def fill(
    model: torch.nn.Module, entries: Mapping[str, torch.Tensor], source: str, *, cast: bool = True
) -> None:
    """Fills a model on the meta device with exactly its entries, each of the right shape.

    Args:
        entries: name -> tensor; floating-point ones are cast to the model's dtype, others must have it.
        source: the entries' name in errors.
        cast: False uses floating-point entries as they are: parameters are then shared with `entries`.

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


def check_levels(var: VAR, source: str) -> None:
    """Raises CheckpointError unless `lvl_1L`, the only entry that is an index, gives each token its scale."""
    counts = torch.tensor(var.schedule.lengths)
    levels = torch.arange(len(counts)).repeat_interleave(counts)
    if not torch.equal(var.lvl_1L, levels[None]):
        raise CheckpointError(
            f"{source} must have in lvl_1L the scale of each token, 0..{len(counts) - 1} in order of the patch_nums "
            f"{var.schedule.patch_nums}, got others: it is damaged, or of another model"
        )


def _fits(tensor: torch.Tensor, wanted: torch.Tensor) -> bool:
    both_float = tensor.is_floating_point() and wanted.is_floating_point()
    return tensor.shape == wanted.shape and (both_float or tensor.dtype == wanted.dtype)
