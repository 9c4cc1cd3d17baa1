"""Runs trainings on ranks: `ranked(world, cases)` from a test, or `python -m tests.training.ranked` under torchrun.

A case is (kind, arguments of the trainer, recipe); "tune" is "var" that begins with the model of its tokenizer. What
each rank drops and reads, row by row, goes into OUT/rows-RANK.pt.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from var_ext.models import VAR
from var_ext.training import train_tokenizer, train_var
from var_ext.training.tokenizer import TokenizerTask
from var_ext.training.var import VARTask

Case = tuple[str, tuple[Any, ...], Any]
ROOT = Path(__file__).resolve().parents[2]


def launch(world: int, *arguments: str) -> list[str]:
    """The command that starts ranks, on a port of its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return [*torchrun, *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def ranked(world: int, cases: list[Case], scratch: Path) -> None:
    """Train all cases, one after the other, on the same ranks."""
    path = scratch / f"cases-{world}.pkl"
    path.write_bytes(pickle.dumps(cases))
    command = launch(world, "-m", "tests.training.ranked", str(path))
    done = subprocess.run(
        command, env=environment(), cwd=scratch, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def train(case: Case) -> None:
    """Train one case, and record what its rows see."""
    kind, arguments, recipe = case
    seen: list[tuple[torch.Tensor, ...]] = []
    labels, paths, step = VAR.dropped_labels, VAR.drop_paths, TokenizerTask.step
    feed = VARTask.feed

    def record_labels(self: VAR, given: torch.Tensor) -> torch.Tensor:
        seen.append((labels(self, given),))
        return seen[-1][0]

    def record_paths(self: VAR, modulations: Any, draws: Any) -> Any:
        dropped = paths(self, modulations, draws)
        seen[-1] += (torch.stack([gate[:, 0] == 0 for both in dropped for gate in both[:2]], 1),)
        return dropped

    def record_tokens(self: VARTask, epoch: int, batches: torch.Tensor) -> Any:
        for tokens, given in feed(self, epoch, batches):
            seen.append((tokens, given))
            yield tokens, given

    def record_images(self: TokenizerTask, at: Any, batch: Any) -> Any:
        seen.append(tuple(batch))
        return step(self, at, batch)

    VAR.dropped_labels, VAR.drop_paths = record_labels, record_paths  # type: ignore[method-assign]
    VARTask.feed, TokenizerTask.step = record_tokens, record_images  # type: ignore[method-assign]
    try:
        if kind != "tokenizer":
            source = arguments[1] if kind == "tune" else None
            out = train_var(*arguments, recipe, init_from=source, progress=False)
        else:
            out = train_tokenizer(*arguments, recipe, progress=False)
    finally:
        VAR.dropped_labels, VAR.drop_paths = labels, paths  # type: ignore[method-assign]
        VARTask.feed, TokenizerTask.step = feed, step  # type: ignore[method-assign]
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save(seen, out / f"rows-{rank}.pt")


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in pickle.loads(Path(sys.argv[1]).read_bytes()):
        train(case)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
