"""Adapters of low rank (LoRA, arXiv 2106.09685) in the folder format of `peft`, read without it.

adapter_config.json names the model that they were trained on and how they are scaled; adapter_model.safetensors holds
"base_model.model.LAYER.lora_A.weight" (r, in) and "...lora_B.weight" (out, r) for each linear layer, and entries that
take the place of the model's own. Folders of this project have a config.json besides: the number of classes, their
names, and cfg, top_k and top_p.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from var_ext.checkpoints.adapter_entries import merged
from var_ext.checkpoints.atomic import CheckpointError, read_json, write_json
from var_ext.checkpoints.model_folder import CONFIG, FORMAT, ModelFolder, Weights
from var_ext.checkpoints.tensors import Entries, load_tensors, save_tensors

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# Fields of adapter_config.json that change what an adapter does, and the values that mean plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "use_dora": (False, None), "bias": ("none", None), "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None), "layer_replication": (None,), "fan_in_fan_out": (False, None),
}  # fmt: skip


def save_adapter(
    folder: Path,
    adapter: Mapping[str, Tensor],
    description: Mapping[str, Any],
    *,
    num_classes: int,
    sampling: Mapping[str, float],
    class_names: Sequence[str] | None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a folder that `load` puts on the base model; adapter_config.json comes last, and each file atomically.

    Args:
        adapter: by `LAYER` + `A`, `B`, and entries that replace those of the model.
        description: fields of peft's LoraConfig.
        num_classes, sampling, class_names: of the model with the adapters.
        dtype: on disk.

    Raises:
        CheckpointError: a file could not be written.
    """
    save_tensors(
        folder / ADAPTER_WEIGHTS, {PREFIX + n: t.to(dtype) for n, t in adapter.items()}, {"format": "pt"}
    )
    names = None if class_names is None else list(class_names)
    own = {"var": {"num_classes": num_classes}, "sampling": dict(sampling), "class_names": names}
    write_json(folder / CONFIG, {"format": FORMAT, **own})
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in description.items()}
    write_json(folder / ADAPTER_CONFIG, fields)
    return folder


def open_adapter(
    source: str,
    locate: Callable[[str], Path],
    own: Mapping[str, Any],
    find: Callable[[str], ModelFolder],
) -> ModelFolder:
    """The base model of the adapters in a folder, with them merged into its weights when these are read.

    Args:
        source: the folder's name in errors.
        locate: returns the path of a file in it, fetched if need be.
        own: its config.json, empty where it has none.
        find: returns the model of a name or path.

    Raises:
        CheckpointError: the config is broken or no plain LoRA, or the base model cannot be found or has no transformer.
    """
    file, config = f"{source}/{ADAPTER_CONFIG}", read_json(locate(ADAPTER_CONFIG))
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise CheckpointError(
                f"{file} must have {key} = {plain[0]!r}, got {config.get(key)!r}: merge it with peft, "
                "and save the model"
            )
    name, rank, alpha = (config.get(key) for key in ("base_model_name_or_path", "r", "lora_alpha"))
    if (
        not isinstance(name, str)
        or not isinstance(rank, int)
        or not isinstance(alpha, int | float)
        or rank < 1
    ):
        raise CheckpointError(
            f"{file} must name a model in base_model_name_or_path, and have the numbers r and lora_alpha, got "
            f"{name!r}, {rank!r} and {alpha!r}"
        )
    try:
        base = find(name)
    except ValueError as error:
        raise CheckpointError(
            f"{source} holds adapters of another model, which is not there: {error}"
        ) from error
    if base.var_config is None or base.var_weights is None:
        raise CheckpointError(
            f"{source} holds adapters of {name}, which must have a transformer, got a tokenizer alone"
        )
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    weights, below = f"{source}/{ADAPTER_WEIGHTS}", base.var_weights

    def read() -> Entries:
        adapter = {n.removeprefix(PREFIX): t for n, t in load_tensors(locate(ADAPTER_WEIGHTS)).items()}
        return merged(below.read(), adapter, scale, weights)

    return replace(
        base, source=source, var_config={**base.var_config, **own.get("var", {})}, var_weights=Weights(weights, read),
        sampling=own.get("sampling", base.sampling), class_names=own.get("class_names", base.class_names),
    )  # fmt: skip


def is_of_adapters(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a folder of adapters: it describes no tokenizer."""
    return config.get("format") == FORMAT and "vae" not in config
