"""`last.ckpt`: all that a killed run needs to resume exactly.

A checkpoint is a dict of plain values and tensors, so it is read with `weights_only=True` and can never run code.
Tensors that ranks share out (`--shard full`) lie beside it in the folder `last.ckpt-STEP`, written by all ranks at once
as safetensors; the checkpoint names the folder once that is complete. `pins` identifies the run (kind, data, recipe); a
run with other pins refuses the checkpoint.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from var_ext.checkpoints import CheckpointError, atomic_write, first_line
from var_ext.training.ranks import ALONE, Ranks

FORMAT = "var_ext/train/2"  # 1: random numbers not by row, state of the optimizer by number
SHARED_OUT = "shared out"  # stands in the checkpoint for a tensor of the folder
DIGESTS = "digests"  # the pin whose entries are digests, by names a reader understands ("training images")


def save_checkpoint(
    path: Path, pins: Mapping[str, Any], step: int, state: Mapping[str, Any], ranks: Ranks = ALONE
) -> None:
    """Write a checkpoint atomically; ranks call this together.

    Raises:
        CheckpointError: it could not be written (full disk, no permission); an older file is left unchanged.
    """
    plain, parts = _split(state)
    folder = path.with_name(f"{path.name}-{step}") if parts else None
    if folder is not None:
        with ranks.one_first():
            if ranks.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it wrote it
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            save(parts, storage_writer=writer, process_group=ranks.patient)
        except (Exception, CheckpointException) as error:  # many classes, and that one is no Exception
            raise CheckpointError(f"could not write {folder}: {_reason(error)}; {path} is kept") from error
    if ranks.rank == 0:
        name = folder.name if folder else None
        content = {"format": FORMAT, "pins": dict(pins), "step": step, "world": ranks.world, "folder": name}
        _write(path, {**content, "state": plain})
        for old in path.parent.glob(f"{path.name}-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
    ranks.wait()


def _reason(error: BaseException) -> str:
    """The first line of an error, of the first rank that failed."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return first_line(next((failure for failure, _ in failures.values()), error))


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        with atomic_write(path) as handle:
            torch.save(dict(content), handle)
    except RuntimeError as error:
        # torch's zip writer turns a failed write into a RuntimeError of its own
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"could not write {path}: {error.__context__ or error}; an older file is kept"
        ) from error


def load_checkpoint(
    path: Path, pins: Mapping[str, Any], like: Mapping[str, Tensor] | None = None, ranks: Ranks = ALONE
) -> tuple[int, int, dict[str, Any]]:
    """Read a checkpoint of a run with the same `pins`.

    Args:
        like: the parameters by name; what was shared out is read as they are now, in full or shared out.

    Returns:
        steps done, ranks of the run that wrote it, state.

    Raises:
        CheckpointError: truncated or foreign file, or one from another run; the message says which values differ.
    """
    wanted = f"wanted a training checkpoint ({FORMAT}) in {path}"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # torch raises many classes for broken and foreign files: zip, pickle, EOF and runtime errors
    except Exception as error:
        raise CheckpointError(
            f"{wanted}, got a file that cannot be read as one: {first_line(error)}"
        ) from error
    match content:
        case {
            "format": came, "pins": dict(found), "step": int(step), "world": int(world), "folder": folder,
            "state": dict(state),
        } if came == FORMAT:  # fmt: skip
            pass
        case dict():
            entries = ", ".join(map(str, content)) or "none"
            raise CheckpointError(f"{wanted}, got format {content.get('format')} with the entries {entries}")
        case _:
            raise CheckpointError(f"{wanted}, got {type(content).__name__}")
    differing = _differences(pins, found)
    if differing:
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(differing)}. "
            "Start anew with resume=False (--no-resume), or choose another output folder"
        )
    if folder is not None:
        _read_parts(path.with_name(folder), state, like or {}, ranks)
    return step, world, state


def _split(state: Any, path: tuple[str, ...] = ()) -> tuple[Any, dict[str, DTensor]]:
    """State with marks instead of tensors that are shared out, and these by their place, "task/ema/NAME"."""
    if isinstance(state, DTensor):
        return SHARED_OUT, {"/".join(path): state}
    if not isinstance(state, Mapping):
        return state, {}
    plain: dict[str, Any] = {}
    parts: dict[str, DTensor] = {}
    for key, value in state.items():
        plain[key], below = _split(value, (*path, str(key)))
        parts |= below
    return plain, parts


def _read_parts(folder: Path, state: dict[str, Any], like: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Put the tensors of a folder in the place of their marks."""
    places: dict[str, tuple[dict[str, Any], str]] = {}

    def find(level: dict[str, Any], path: tuple[str, ...]) -> None:
        for key, value in level.items():
            if isinstance(value, dict):
                find(value, (*path, str(key)))
            elif isinstance(value, str) and value == SHARED_OUT:
                places["/".join((*path, str(key)))] = level, key

    find(state, ())
    tensors = {}
    for place, (_, name) in places.items():
        if name not in like:
            raise CheckpointError(f"{folder} has {name}, which is no parameter of this model")
        tensors[place] = torch.zeros_like(like[name].detach())
    try:
        load(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(folder)),
            process_group=ranks.patient,
            no_dist=ranks.world == 1,
        )
    except (Exception, CheckpointException) as error:  # as in saving
        raise CheckpointError(f"wanted the tensors of a checkpoint in {folder}: {_reason(error)}") from error
    for place, (level, name) in places.items():
        level[name] = tensors[place]


def _differences(wanted: Mapping[str, Any], came: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in sorted({*wanted, *came}):
        a, b = wanted.get(key, "nothing"), came.get(key, "nothing")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            # two digests would tell a reader nothing
            lines.append(
                f"{key} changed" if prefix == f"{DIGESTS}." else f"wanted {prefix}{key} = {a}, got {b}"
            )
    return lines
