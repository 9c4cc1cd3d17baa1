"""log.jsonl: what a run measured, one JSON object a line."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from var_ext.checkpoints import CheckpointError, atomic_write
from var_ext.checkpoints.training_run import log_lines
from var_ext.training.board import Board


class Diverged(RuntimeError):
    """A metric such as loss or gradient is no longer finite."""


class Log:
    """Lines with step, phase, seconds of the run and metrics.

    Lines after step `done` are dropped first: a killed run wrote them, and the resumed run writes them again.

    Args:
        writes: False on the ranks that only check.
        board: what shows the lines too.
    """

    def __init__(self, path: Path, done: int, *, writes: bool = True, board: Board | None = None) -> None:
        kept = [line for line in read_log(path) if line["step"] <= done] if writes else []
        if writes:
            with atomic_write(path) as handle:
                handle.write("".join(json.dumps(line) + "\n" for line in kept).encode())
        self.path, self.writes, self.board, self.began = path, writes, board, time.monotonic()
        if board is not None:
            board.remember(kept)
        self.before = max((float(line.get("seconds", 0)) for line in kept), default=0.0)

    def write(self, step: int, phase: str, metrics: Mapping[str, Any]) -> None:
        """Append the metrics of a phase: numbers, or lists of one a scale.

        Raises:
            Diverged: one of them is not finite, on all ranks alike.
            CheckpointError: the line cannot be written.
        """
        seconds = round(self.before + time.monotonic() - self.began, 2)
        values = {key: _rounded(value) for key, value in metrics.items()}
        for key, value in values.items():
            if not np.isfinite(value).all():
                raise Diverged(f"the {key} of {phase} must be finite, got {value} at step {step}")
        if not self.writes:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "phase": phase, "seconds": seconds, **values}) + "\n")
        except OSError as error:
            raise CheckpointError(f"could not write {self.path}: {error.strerror or error}") from error
        if self.board is not None:
            self.board.add(step, phase, values)

    def show(self, step: int, picture: Tensor) -> None:
        """Put a picture (3, H, W) beside the lines, where there is a board."""
        if self.board is not None:
            self.board.picture(step, picture)


def _rounded(value: Any) -> Any:
    return [_rounded(v) for v in value] if isinstance(value, list) else float(f"{float(value):.6g}")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of an earlier log that name their step and phase. Raises CheckpointError if it cannot be read."""
    return [
        line
        for line in log_lines(path)
        if isinstance(line.get("step"), int) and isinstance(line.get("phase"), str)
    ]
