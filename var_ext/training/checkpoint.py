"""`last.ckpt`: all that a killed run needs to resume exactly.

A checkpoint is a dict of plain values and tensors, so it is read with `weights_only=True` and can never run
code. `pins` identifies the run (kind, data, recipe); a run with other pins refuses the checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from var_ext.checkpoints import CheckpointError, atomic_write, first_line

FORMAT = "var_ext/train/1"
DIGESTS = "digests"  # the pin whose entries are digests, by names a reader understands ("training images")


def save_checkpoint(path: Path, pins: Mapping[str, Any], step: int, state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically.

    Raises:
        CheckpointError: it could not be written (full disk, no permission); an older file is left unchanged.
    """
    content = {"format": FORMAT, "pins": dict(pins), "step": step, "state": dict(state)}
    try:
        with atomic_write(path) as handle:
            torch.save(content, handle)
    except RuntimeError as error:
        # torch's zip writer turns a failed write into a RuntimeError of its own
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"could not write {path}: {error.__context__ or error}; an older file is kept"
        ) from error


def load_checkpoint(path: Path, pins: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Read a checkpoint of a run with the same `pins`.

    Returns:
        steps done, state.

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
        case {"format": came, "pins": dict(found), "step": int(step), "state": dict(state)} if came == FORMAT:
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
    return step, state


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
