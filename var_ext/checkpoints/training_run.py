"""The weights in the checkpoint of a training run: its folder is a model folder from the first checkpoint on."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from var_ext.checkpoints.adapter_entries import merged, scale_of, without_adapters
from var_ext.checkpoints.atomic import CheckpointError, first_line, read_json
from var_ext.checkpoints.tensors import Entries
from var_ext.checkpoints.torch_files import load_plain
from var_ext.paths import is_file_name

log = logging.getLogger(__name__)

FORMAT = "var_ext/train/3"  # 1: random numbers not by row; 2: entries of the model under its kind
SHARED_OUT = "shared out"  # stands in a checkpoint for a tensor of the folder beside it
LAST, LOG, RECIPE, KEPT = "last.ckpt", "log.jsonl", "recipe.json", re.compile(r"step-\d+\.ckpt")


def read_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """The content of a checkpoint, read as tensors and plain values only: "pins", "step", "world", "folder", "state".

    Args:
        mmap: leave tensors in the file until they are used.

    Raises:
        CheckpointError: it is missing, truncated, or no checkpoint of this format.
    """
    wanted = f"wanted a training checkpoint ({FORMAT}) in {path}"
    try:
        content: Any = load_plain(path, mmap=mmap)
    # torch raises many classes for broken and foreign files: zip, pickle, EOF and runtime errors
    except Exception as error:
        raise CheckpointError(
            f"{wanted}, got a file that cannot be read as one: {first_line(error)}"
        ) from error
    match content:
        case {
            "format": came, "pins": dict(), "step": int(), "world": int(), "folder": folder, "state": dict(),
        } if came == FORMAT and (folder is None or is_file_name(folder)):  # fmt: skip
            return content
        case dict():
            entries = ", ".join(map(str, content)) or "none"
            raise CheckpointError(f"{wanted}, got format {content.get('format')} with the entries {entries}")
        case _:
            raise CheckpointError(f"{wanted}, got {type(content).__name__}")


def kept_weights(path: Path) -> Entries:
    """The weights that the run would keep if it ended at this checkpoint: the best ones, else averaged, else the last.

    Raises:
        CheckpointError: the file is no checkpoint, or what was shared out beside it is missing or damaged.
    """
    content = read_checkpoint(path, mmap=True)
    try:
        return _kept(content, path)
    # a stranger's file may hold anything in place of what is looked for
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(
            f"{path} must hold the weights of a training run, but lacks them ({why})"
        ) from error


def _kept(content: Mapping[str, Any], path: Path) -> Entries:
    task, best = content["state"]["task"], content["state"]["best"]
    if best:
        places = {name: (value, f"best/weights/{name}") for name, value in best["weights"].items()}
    else:
        places = {name: (value, f"task/model/{name}") for name, value in task["model"].items()}
        places |= {name: (value, f"task/ema/{name}") for name, value in (task["ema"] or {}).items()}
    entries = {name: value for name, (value, _) in places.items() if isinstance(value, torch.Tensor)}
    shared_out = {name: place for name, (_, place) in places.items() if name not in entries}
    if shared_out:
        parts = _read_parts(path.with_name(content["folder"]), list(shared_out.values()))
        entries |= {name: parts[place] for name, place in shared_out.items()}
    base, adapter = without_adapters(entries)
    if not adapter:
        return entries
    recipe = content["pins"]["recipe"]
    return merged(base, adapter, scale_of(recipe["lora"], recipe["lora_alpha"]), str(path))


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe.json of the run in a folder, with "kind" and "recipe"; empty where there is none of a run.

    Raises:
        CheckpointError: it is broken.
    """
    found: dict[str, Any] = read_json(folder / RECIPE) if (folder / RECIPE).exists() else {}
    return found if isinstance(found.get("kind"), str) and isinstance(found.get("recipe"), dict) else {}


def progress(folder: Path) -> str:
    """Where the run in a folder stands, from the last lines of its log: "step 1200, loss 3.2, in validation 3.4"."""
    latest: dict[object, tuple[int, float]] = {}
    for line in log_lines(folder / LOG):
        match line:
            case {"phase": str(phase), "step": int(step), "loss": int() | float() as loss}:
                latest[phase] = step, loss
    if "train" not in latest:
        return "no step is logged yet"
    step, loss = latest["train"]
    said = f"step {step}, loss {loss:.3g}"
    return said + (f", in validation {latest['val'][1]:.3g}" if "val" in latest else "")


def log_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log.jsonl, those that are JSON objects; none where there is no file. A line that is being
    written, or was cut off by a kill, is passed over.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error
    found: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            log.warning("skipping a broken line in %s", path)
            continue
        found += [value] if isinstance(value, dict) else []
    return found


def _read_parts(folder: Path, places: list[str]) -> Mapping[str, torch.Tensor]:
    """Whole tensors from parts that ranks wrote."""
    # imported here: most models need none of torch.distributed
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        found: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        tensors = {
            place: torch.empty(found[place].size, dtype=found[place].properties.dtype) for place in places
        }
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except (Exception, CheckpointException) as error:  # many classes, and that one is no Exception
        raise CheckpointError(
            f"wanted the tensors of a checkpoint in {folder}: {first_line(error)}"
        ) from error
    return tensors
