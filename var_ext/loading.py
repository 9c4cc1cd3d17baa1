"""`load`: from a name to a sampler."""

from __future__ import annotations

import os

import torch

from var_ext import backend
from var_ext.checkpoints import find_model
from var_ext.sampling import Sampler


def load(
    name_or_path: str | os.PathLike[str] = "digits",
    *,
    device: torch.device | str = "cpu",
    precision: str | torch.dtype | None = None,
    revision: str | None = None,
) -> Sampler:
    """Loads a model, ready to sample.

    Args:
        name_or_path: a bundled model ("digits"); a published one ("var-d16", "-d20", "-d24", "-d30",
            "-d36"), fetched and cached by huggingface_hub; a model folder; or "owner/name", a hub repository
            with the files of a model folder. Names come first: write "./digits" or pass a `Path` for a
            folder of the same name.
        device: where to put the model.
        precision: "fp32", "bf16", "fp16" or "int8", see `Sampler`; None: "bf16" where the device supports
            it, else "fp32".
        revision: commit, tag or branch of a model on the hub; "NAME@REVISION" says the same, wherever a name is taken.
            A commit pins the bytes: git names content by its digest. None: the newest.

    Raises:
        ValueError: unknown model, missing device, or one that does not support the precision.
        CheckpointError: its files cannot be fetched, read, or used.
    """
    device = checked_device(device)
    folder = find_model(name_or_path, revision)
    vae, var = folder.models()
    return Sampler(
        vae.to(device),
        var.to(device),
        class_names=folder.class_names,
        defaults=folder.sampling,
        precision=precision,
    )


def checked_device(device: torch.device | str) -> torch.device:
    """The device, if this machine has it; ValueError if not, or if it is not a device."""
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be one such as 'cpu', 'cuda' or 'cuda:1', got {device!r}") from error
    if wanted.type not in backend.DEVICES:
        raise ValueError(f"device must be one of {', '.join(backend.DEVICES)}, got {str(device)!r}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (wanted.index or 0) >= (gpus if wanted.type == "cuda" else 1):
        raise ValueError(f"device must be one this machine has, got {str(device)!r} with {gpus} usable GPUs")
    return wanted
