"""What the programs that make bundled models share: clocks of stages, finished runs, cards, whole folders."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click
import torch

from var_ext.checkpoints import atomic_write
from var_ext.training import TokenizerRecipe, VARRecipe
from var_ext.training.log import read_log

T = TypeVar("T")


class Clock:
    """Seconds of each stage, kept in the work folder so that a resumed run knows what went before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def run(self, stage: str, work: Callable[[], T], log: Path | None = None, *, resumes: bool = False) -> T:
        """Runs a stage and notes its time. Of one that resumes, as all with a log do, earlier runs count as well."""
        began, before = time.perf_counter(), self.seconds.get(stage, 0.0) if log or resumes else 0.0
        try:
            return work()
        finally:
            spent = before + time.perf_counter() - began
            logged = [line["seconds"] for line in read_log(log)] if log is not None else []
            self.seconds[stage] = max([spent, *logged])
            self.path.write_text(json.dumps(self.seconds))

    def minutes(self, stage: str) -> str:
        return f"{self.seconds[stage] / 60:.1f} min"


def found(path: Path, recipe: TokenizerRecipe | VARRecipe) -> str:
    """What a trainer measured on validation data with the weights it kept."""
    lines = [line for line in read_log(path) if line["phase"] == "val"]
    line = min(lines, key=lambda item: item["loss"]) if recipe.select == "best" else lines[-1]
    numbers = [
        f"{key} {value:.4g}" for key, value in line.items() if isinstance(value, float) and key != "seconds"
    ]
    return f"{', '.join(numbers)} (step {line['step']})"


def listing(recipe: TokenizerRecipe | VARRecipe, preset: TokenizerRecipe | VARRecipe | None = None) -> str:
    """The fields of a recipe that decide the weights, for the card; of a preset those that differ from it."""
    same = {} if preset is None else preset.pinned()
    items = recipe.pinned().items()
    return ", ".join(f"{name} {value}" for name, value in items if name not in same or same[name] != value)


def finished(
    folder: Path, recipe: TokenizerRecipe | VARRecipe, source: Path | None = None, *, timed: bool = True
) -> bool:
    """Whether the latest training in a folder was of this recipe and ended.

    Args:
        source: the folder of what it was trained with; a later training there makes this one unfinished.
        timed: whether times of files say which came last, as they do unless they were checked out or unpacked.
    """
    config, began = folder / "config.json", folder / "recipe.json"
    if not (config.is_file() and began.is_file()):
        return False
    if timed and config.stat().st_mtime < began.stat().st_mtime:
        return False
    if source is not None and config.stat().st_mtime < (source / "config.json").stat().st_mtime:
        return False
    if "training" in json.loads(
        config.read_text(encoding="utf-8")
    ):  # a model from the first step on, of a checkpoint
        return False
    return json.loads(began.read_text(encoding="utf-8"))["recipe"] == recipe.pinned()


def size_of(model: torch.nn.Module, file: Path) -> str:
    count = sum(p.numel() for p in model.parameters())
    return f"{count / 1e6:.2f} M parameters, {file.stat().st_size / 1e6:.2f} MB"


def publish(model: Path, out: Path) -> None:
    """Copies the finished files, each whole or not at all, the one that makes a folder a model last."""
    for path in sorted(model.glob("[!.]*"), key=lambda path: path.name == "config.json"):
        with atomic_write(out / path.name) as handle:
            handle.write(path.read_bytes())


def options(pairs: tuple[str, ...]) -> dict[str, str]:
    """("epochs=3",) -> {"epochs": "3"}."""
    for pair in pairs:
        if "=" not in pair:
            raise click.BadParameter(f"a recipe option must be NAME=VALUE, got {pair!r}")
    return {pair.split("=", 1)[0]: pair.split("=", 1)[1] for pair in pairs}
