"""`last.ckpt`: all that a killed run needs to resume exactly.

A checkpoint is a dict of plain values and tensors, so it is read with `weights_only=True` and can never run code.
Tensors that ranks share out (`--shard full`) lie beside it in the folder `last.ckpt-STEP`, written by all ranks at once
as safetensors; the checkpoint names the folder once that is complete. `pins` identifies the run (kind, data, recipe); a
run with other pins refuses the checkpoint, except that its epochs may grow. `step-STEP.ckpt` are older ones that are
kept.
"""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from var_ext.checkpoints import CheckpointError, atomic_write, first_line
from var_ext.checkpoints.training_run import FORMAT, KEPT, SHARED_OUT, read_checkpoint
from var_ext.training.ranks import ALONE, Ranks

GRACE = 20.0  # seconds that a run which ends with an error waits for its last checkpoint
DIGESTS = "digests"  # the pin whose entries are digests, by names a reader understands ("training images")


class Saver:
    """Writes checkpoints in a thread beside the training, one after the other. All ranks use theirs together.

    A context: an error in it waits for a checkpoint that is being written, but not for long: other ranks may be gone.

    Args:
        path: of the last checkpoint.
        keep: how many of the newest stay as step-STEP.ckpt besides.
    """

    def __init__(self, path: Path, ranks: Ranks = ALONE, keep: int = 0) -> None:
        self.path, self.ranks, self.keep = path, ranks, keep
        self.thread: Thread | None = None
        self.error: CheckpointError | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self.thread is not None:
            self.thread.join(GRACE)

    def save(self, pins: Mapping[str, Any], step: int, state: Mapping[str, Any]) -> None:
        """Wait for the checkpoint before, copy the state into memory of the CPU, and begin to write.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        plain, parts = _split(state)
        # plain copies, none of them in the background
        stager = DefaultStager(StagingOptions(False, False, False, False))
        copied: Any = stager.stage({"plain": {} if self.ranks.rank else plain, "parts": parts})
        stager.close()

        def write() -> None:
            try:
                _save(self.path, pins, step, copied["plain"], copied["parts"], self.ranks, self.keep)
            except CheckpointError as error:
                self.error = error
            except Exception as error:  # nobody would see it in this thread
                self.error = CheckpointError(f"could not write {self.path}: {first_line(error)}")

        # A daemon: an error elsewhere ends the process at once, and a checkpoint cut off leaves the one before.
        self.thread = Thread(target=write, name="checkpoint", daemon=True)
        self.thread.start()
        self.ranks.wait()  # for the one that copies most; waiting in the next step has its limit

    def failed(self) -> bool:
        """Whether the last checkpoint turned out not to be writable; does not wait."""
        return self.error is not None

    def wait(self) -> None:
        """Until all ranks have written the last checkpoint. Raises CheckpointError if this one could not."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            raise self.error
        self.ranks.wait()


def save_checkpoint(
    path: Path, pins: Mapping[str, Any], step: int, state: Mapping[str, Any], ranks: Ranks = ALONE
) -> None:
    """Write a checkpoint atomically; ranks call this together.

    Raises:
        CheckpointError: it could not be written (full disk, no permission); an older file is left unchanged.
    """
    _save(path, pins, step, *_split(state), ranks, 0)


def _save(
    path: Path,
    pins: Mapping[str, Any],
    step: int,
    plain: Mapping[str, Any],
    parts: dict[str, DTensor],
    ranks: Ranks,
    keep: int,
) -> None:
    folder = path.with_name(f"{path.name}-{step}") if parts else None
    if folder is not None:
        if ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it wrote it
        if ranks.world > 1:
            torch.distributed.barrier(ranks.saving)
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            save(parts, storage_writer=writer, process_group=ranks.saving)
        except (Exception, CheckpointException) as error:  # many classes, and that one is no Exception
            raise CheckpointError(f"could not write {folder}: {_reason(error)}{kept(path)}") from error
    if ranks.rank == 0:
        name = folder.name if folder else None
        content = {"format": FORMAT, "pins": dict(pins), "step": step, "world": ranks.world, "folder": name}
        _write(path, {**content, "state": plain})
        _tidy(path, step, keep)


def _tidy(path: Path, step: int, keep: int) -> None:
    """Give the new checkpoint its name among those that are kept, and remove older ones and their folders."""
    if keep:
        kept = path.with_name(f"step-{step}.ckpt")
        with suppress(FileNotFoundError):
            kept.unlink()
        try:
            os.link(path, kept)
        except OSError:  # a file system without links
            shutil.copyfile(path, kept)
    found = [file for file in path.parent.iterdir() if KEPT.fullmatch(file.name)]
    # by time: what a run that was started anew left has other steps
    found.sort(key=lambda file: file.stat().st_mtime_ns, reverse=True)
    if keep:
        for old in found[keep:]:
            old.unlink(missing_ok=True)
    steps = {str(step), *(file.stem.removeprefix("step-") for file in found[: keep or None])}
    for folder in path.parent.glob(f"{path.name}-*"):
        if folder.name.removeprefix(f"{path.name}-") not in steps:
            shutil.rmtree(folder, ignore_errors=True)


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
        raise CheckpointError(f"could not write {path}: {error.__context__ or error}{kept(path)}") from error


def kept(path: Path) -> str:
    """What an error adds of an earlier checkpoint: nothing where there is none."""
    return f"; {path} is kept" if path.is_file() else ""


class Checkpoint(NamedTuple):
    """Steps done, ranks and epochs of the run that wrote it, and its state."""

    step: int
    world: int
    epochs: int
    state: dict[str, Any]


def load_checkpoint(
    path: Path, pins: Mapping[str, Any], like: Mapping[str, Tensor] | None = None, ranks: Ranks = ALONE
) -> Checkpoint:
    """Read a checkpoint of a run with the same `pins`, or with fewer epochs.

    Args:
        like: the parameters by name; what was shared out is read as they are now, in full or shared out.

    Raises:
        CheckpointError: truncated or foreign file, or one from another run; the message says which values differ.
    """
    content = read_checkpoint(path)
    found, state, folder = content["pins"], content["state"], content["folder"]
    epochs, wanted = (_epochs(each) for each in (found, pins))
    if 0 < epochs < wanted:
        found = {**found, "recipe": {**found["recipe"], "epochs": wanted}}
    differing = _differences(pins, found)
    if differing:
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(differing)}. "
            "Start anew with resume=False (--no-resume), or choose another output folder"
        )
    if folder is not None:
        _read_parts(path.with_name(folder), state, like or {}, ranks)
    return Checkpoint(content["step"], content["world"], epochs, state)


def _epochs(pins: Mapping[str, Any]) -> int:
    """Those of the recipe, 0 where it names none."""
    match pins:
        case {"recipe": {"epochs": int(epochs)}}:
            return epochs
    return 0


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
