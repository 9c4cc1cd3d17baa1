"""From a name to a model: bundled, published, in a folder, or in a repository on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from var_ext import backend
from var_ext.checkpoints import model_folder as folder
from var_ext.checkpoints import sizes as published
from var_ext.checkpoints.atomic import CheckpointError, first_line
from var_ext.checkpoints.model_folder import save_model
from var_ext.checkpoints.sizes import published_config
from var_ext.models import VAR, VQVAE
from var_ext.sampling import DEFAULTS, Sampler

__all__ = [
    "bundled_models",
    "checked_device",
    "convert",
    "load",
    "load_published",
    "load_tokenizer",
    "published_config",
    "save_model",
]


def bundled_models() -> dict[str, Path]:
    """The models inside the package: name -> folder."""
    weights = Path(str(resources.files("var_ext") / "weights"))
    return {path.parent.name: path.parent for path in sorted(weights.glob(f"*/{folder.CONFIG}"))}


def checked_device(device: torch.device | str) -> torch.device:
    """The device, if this machine has it. Raises ValueError if not, or if it is no device at all."""
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


def load(
    name_or_path: str | os.PathLike[str] = "digits",
    *,
    device: torch.device | str = "cpu",
    precision: str | torch.dtype | None = None,
) -> Sampler:
    """Loads a model, ready to sample.

    Args:
        name_or_path: a bundled model ("digits"); a published one ("var-d16", "-d20", "-d24", "-d30",
            "-d36"), fetched and cached by huggingface_hub; a model folder; or "owner/name", a hub repository
            with the files of a model folder. Names come first: write "./digits" for a folder that is called
            like one.
        device: where to put the model.
        precision: "fp32", "bf16", "fp16" or "int8", see `Sampler`; None: "bf16" where the device has its
            arithmetic, else "fp32".

    Raises:
        ValueError: no such model, a device that is not there, or one without this precision.
        CheckpointError: its files cannot be fetched, read, or used.
    """
    device = checked_device(device)
    name = os.fspath(name_or_path)
    if name in published.MODELS:
        vae, var = load_published(
            _fetch_published(published.TOKENIZER_FILE), _fetch_published(_var_file(name))
        )
        settings: dict[str, Any] = {"sampling": dict(DEFAULTS)}
    else:
        path = find_folder(name_or_path, [folder.CONFIG, folder.VAE_WEIGHTS, folder.VAR_WEIGHTS])
        settings = folder.read_config(path)
        vae = folder.load_vae(path)
        var = folder.load_var(path, vae)
    return Sampler(
        vae.to(device),
        var.to(device),
        class_names=settings.get("class_names"),
        defaults=settings.get("sampling") or None,
        precision=precision,
    )


def load_tokenizer(name_or_path: str | os.PathLike[str] = "digits") -> VQVAE:
    """Loads the tokenizer alone, on the CPU in fp32.

    Takes the same names as `load` and raises the same errors.
    """
    name = os.fspath(name_or_path)
    if name in published.MODELS:
        entries, _ = published.read_pth(_fetch_published(published.TOKENIZER_FILE))
        patch_nums = published_config(published.MODELS[name])["vae"]["v_patch_nums"]
        return _published_vae(entries, patch_nums, published.TOKENIZER_FILE)
    return folder.load_vae(find_folder(name_or_path, [folder.CONFIG, folder.VAE_WEIGHTS]))


def load_published(
    vae_pth: str | os.PathLike[str],
    var_pth: str | os.PathLike[str] | None = None,
    *,
    patch_nums: Sequence[int] | None = None,
    num_heads: int | None = None,
) -> tuple[VQVAE, VAR]:
    """Builds both models from `.pth` files of the published implementation; sizes come from the entries'
    shapes.

    Args:
        vae_pth: entries of the tokenizer, or the trainer's checkpoint, which has both models.
        var_pth: entries of the transformer, or the trainer's checkpoint; None if `vae_pth` has them.
        patch_nums, num_heads: only where the entries do not tell; see `var_ext.checkpoints.sizes.deduce_var`.

    Raises:
        CheckpointError: a file is missing, damaged, carries code, or does not fit.
    """
    vae, var = _read_published(vae_pth, var_pth, patch_nums, num_heads)
    if var is None:
        raise CheckpointError(
            f"{vae_pth} has the entries of a tokenizer alone: give the file of the transformer too"
        )
    return vae, var


def convert(
    vae_pth: str | os.PathLike[str],
    var_pth: str | os.PathLike[str] | None,
    out_folder: str | os.PathLike[str],
    *,
    patch_nums: Sequence[int] | None = None,
    num_heads: int | None = None,
    class_names: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Turns `.pth` files of the published implementation into a model folder (safetensors and JSON).

    Args as in `load_published`, except that a tokenizer's file alone gives a tokenizer's folder;
    `class_names` and `dtype` as in `save_model`.

    Raises:
        CheckpointError: a file cannot be read or used, or the folder cannot be written.
    """
    vae, var = _read_published(vae_pth, var_pth, patch_nums, num_heads)
    return save_model(
        out_folder,
        vae,
        var,
        sampling=dict(DEFAULTS) if var else None,
        class_names=class_names,
        dtype=dtype,
    )


def _read_published(
    vae_pth: str | os.PathLike[str],
    var_pth: str | os.PathLike[str] | None,
    patch_nums: Sequence[int] | None,
    num_heads: int | None,
) -> tuple[VQVAE, VAR | None]:
    vae_entries, var_entries = published.read_pth(vae_pth)
    if var_pth is not None:
        _, var_entries = published.read_pth(var_pth)
        if var_entries is None:
            raise CheckpointError(
                f"{var_pth} must hold a transformer, but has the entries of a tokenizer alone"
            )
    if vae_entries is None:
        raise CheckpointError(f"{vae_pth} must hold a tokenizer, but has the entries of a transformer alone")
    if var_entries is None:
        return _published_vae(vae_entries, patch_nums, str(vae_pth)), None
    source = str(var_pth or vae_pth)
    config = published.deduce_var(var_entries, source, patch_nums=patch_nums, num_heads=num_heads)
    vae = _published_vae(vae_entries, config["patch_nums"], str(vae_pth))
    var = folder.build_var(vae, config, source)
    folder.fill(var, var_entries, source)
    return vae, var


def _published_vae(entries: published.Entries | None, patch_nums: Sequence[int] | None, source: str) -> VQVAE:
    if entries is None:
        raise CheckpointError(f"{source} must hold a tokenizer, but has the entries of a transformer alone")
    vae = folder.build_vae(published.deduce_vae(entries, patch_nums, source), source)
    if len(entries[published.USAGE]) != len(
        vae.schedule
    ):  # one tokenizer serves several schedules, its record not
        entries = {**entries, published.USAGE: torch.zeros(len(vae.schedule), vae.vocab_size)}
    folder.fill(vae, entries, source)
    return vae


def _var_file(name: str) -> str:
    return f"var_d{published.MODELS[name]}.pth"


def find_folder(name_or_path: str | os.PathLike[str], files: list[str]) -> Path:
    """Where a model folder lies: in the package, on this disk, or in the hub's cache with `files` fetched."""
    name = os.fspath(name_or_path)
    if isinstance(name_or_path, str) and name in bundled_models():
        return bundled_models()[name]
    path = Path(name)
    if name and path.is_dir():
        return path
    if isinstance(name_or_path, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        fetched = [_fetch(name, files[0])]
        has_var = folder.read_config(fetched[0].parent).get("var") is not None
        fetched += [_fetch(name, file) for file in files[1:] if has_var or file != folder.VAR_WEIGHTS]
        return fetched[0].parent
    known = ", ".join([*bundled_models(), *published.MODELS])
    raise ValueError(
        f"the model must be one of {known}, an existing model folder, or 'owner/name' on the Hugging Face "
        f"hub, got {name!r}"
    )


def _fetch_published(file: str) -> Path:
    return _fetch(
        published.REPOSITORY,
        file,
        hint=" If you have the .pth files, make a folder that load() takes: "
        f"`var-ext convert {published.TOKENIZER_FILE} var_dN.pth --out FOLDER`.",
    )


def _fetch(repository: str, file: str, hint: str = "") -> Path:
    """A file of a hub repository, from the cache if it is there."""
    from huggingface_hub import constants, hf_hub_download  # a second to import, and only needed here

    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # its HTTP client's errors share no base class, and each means: no file
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        local = "" if hint else f" Nor is there a folder {repository!r} here."
        raise CheckpointError(
            f"could not get {file} of https://huggingface.co/{repository}{offline}: "
            f"{first_line(error)}.{local} Without a network, fetch it on another machine with "
            f"`hf download {repository} {file}` and copy the "
            f"cache folder to {constants.HF_HUB_CACHE} (or point HF_HUB_CACHE to it).{hint}"
        ) from error
