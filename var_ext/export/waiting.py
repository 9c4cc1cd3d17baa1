"""Waits for files that other ranks write."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from var_ext.checkpoints import CheckpointError


def wait_for_files(
    paths: Sequence[Path],
    world: int,
    patience: float,
    *,
    what: str,
    every: float = 0.5,
    there: Callable[[int], bool] | None = None,
) -> None:
    """Returns when all files are there; file i is written by rank i modulo `world`.

    Args:
        patience: seconds without a new file after which the ranks that owe one count as lost.
        what: the files are, in the message.
        every: seconds between looks.
        there: whether file i is there and whole; None looks for its name alone.

    Raises:
        CheckpointError: patience has run out; names the ranks.
    """
    left, quiet = list(enumerate(paths)), 0.0
    is_there = there or (lambda i: paths[i].exists())
    while still := [(i, path) for i, path in left if not is_there(i)]:
        quiet = 0.0 if len(still) < len(left) else quiet
        if quiet >= patience:
            ranks = ", ".join(map(str, sorted({i % world for i, _ in still})[:8]))
            raise CheckpointError(
                f"{still[0][1].parent} lacks {len(still)} of {len(paths)} {what}, of rank {ranks} of {world}, "
                f"and none came in {quiet:.0f} s; the same command again makes them, with any number of ranks"
            )
        left = still
        time.sleep(every)
        quiet += every
