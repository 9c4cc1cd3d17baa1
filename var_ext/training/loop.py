"""The one training loop: batches, seeds, log, validation, checkpoints and the best weights.

What is trained is a `Task`; to train something else, write another one. All randomness of step s is seeded by
(seed, s) and the batch of step s is a pure function of (seed, s), so a run killed and resumed from its last
checkpoint gives bitwise the weights of an uninterrupted one: on the CPU, on the same machine, with the same
number of threads. On a GPU only up to rounding, since some sums there have no fixed order.
"""

import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from var_ext.checkpoints import CheckpointError, atomic_write, write_json
from var_ext.training.checkpoint import load_checkpoint, save_checkpoint
from var_ext.training.parallel import as_like, whole
from var_ext.training.precision import tf32
from var_ext.training.ranks import ALONE, Ranks
from var_ext.training.recipes import Recipe

log = logging.getLogger(__name__)

CHECKPOINT, LOG, RECIPE = "last.ckpt", "log.jsonl", "recipe.json"


@dataclass(frozen=True)
class Moment:
    """Progress of a training: `step` of `total` (from 0), in `epoch`; `logged`: the metrics will be read."""

    step: int
    total: int
    epoch: int
    logged: bool

    @property
    def progress(self) -> float:
        """Share of the steps done, in [0, 1)."""
        return self.step / self.total


class Task(ABC):
    """Something to train.

    Attributes:
        recipe: batch size, epochs, seed and so on.
        num_items: images per epoch.
        device: where the weights are.
        pins: plain values that a checkpoint must have in common with this run.
        ranks: the processes that train it together.
    """

    recipe: Recipe
    num_items: int
    device: torch.device
    pins: dict[str, Any]
    ranks: Ranks = ALONE

    @property
    def global_batch(self) -> int:
        """Images of a step, of all ranks."""
        return min(self.recipe.batch_size, self.num_items)

    def parameters(self) -> dict[str, Tensor]:
        """What is trained, by name."""
        return {}

    def start(self) -> None:  # noqa: B027  most tasks need none
        """Called once before step 0 of a new run, with seeded randomness."""

    def load_data(self) -> None:  # noqa: B027  most tasks need none
        """Slow data preparation, called once per run, after the checkpoint is accepted."""

    @abstractmethod
    def feed(self, epoch: int, batches: Tensor) -> Iterable[Any]:
        """The input of `step` for each row of `batches` (n, b) int64: item indices of a part of `epoch`, those of this
        rank."""

    @abstractmethod
    def step(self, at: Moment, batch: Any) -> Mapping[str, Any]:
        """One optimizer step; returns metrics, at least "loss", if `at.logged`."""

    @abstractmethod
    def validate(self) -> Mapping[str, Any]:
        """Metrics on validation data, at least "loss"."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Copies of the weights to keep if the run ended now."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that `load_state_dict` needs to resume exactly."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def epoch_batches(seed: int, epoch: int, num_items: int, batch_size: int) -> Tensor:
    """The batches of an epoch, (steps, batch) int64; the first items fill up the last batch, as published."""
    size = min(batch_size, num_items)
    order = np.random.default_rng([seed, epoch]).permutation(num_items)
    order = np.concatenate([order, order[: -num_items % size]])
    return torch.from_numpy(order.reshape(-1, size).astype(np.int64))


def step_seed(seed: int, step: int) -> int:
    """Seed of torch's generators for one step: (seed, step) mixed into 63 bits."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def in_float32() -> Iterator[None]:
    """Inside the block new tensors are float32, whatever the caller set with `torch.set_default_dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def prepare(out: Path, ranks: Ranks = ALONE) -> None:
    """Create a run's folder first, so that an unwritable one fails before hours of work.

    Raises:
        CheckpointError: nothing can be written there.
    """
    if ranks.rank == 0 and not (out / LOG).exists():
        with atomic_write(out / LOG):
            pass


def fit(task: Task, out: Path, *, resume: bool = True, progress: bool = True) -> dict[str, Tensor]:
    """Train `task` to the end and return the kept weights, on the CPU. All ranks of the task call this together.

    Args:
        task: what to train.
        out: folder of last.ckpt and log.jsonl; created if missing.
        resume: resume from `out`/last.ckpt if it exists; False starts over and overwrites it.
        progress: show a progress bar.

    Raises:
        CheckpointError: the checkpoint is broken or from another run, or `out` cannot be written.
        ValueError: a step has fewer images than there are ranks.
        RuntimeError: a metric such as loss or gradient is no longer finite; the last checkpoint is kept.
    """
    recipe, ranks = task.recipe, task.ranks
    mine = ranks.rows(task.global_batch)
    if task.global_batch < ranks.world:
        raise ValueError(
            f"a step has {task.global_batch} images for {ranks.world} ranks: take a larger batch_size or fewer ranks"
        )
    per_epoch = len(epoch_batches(recipe.seed, 0, task.num_items, recipe.batch_size))
    total = recipe.epochs * per_epoch
    path, done, best = out / CHECKPOINT, 0, None
    gpus = [task.device] if task.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), tf32(recipe.tf32):
        if resume and path.exists():
            done, best = _restore(task, path)
            log.info("resuming %s at step %d of %d", path, done, total)
        else:
            torch.manual_seed(step_seed(recipe.seed, total))
            task.start()
        task.load_data()
        lines = _Log(out / LOG, done, writes=ranks.rank == 0)
        if ranks.rank == 0:
            write_json(out / RECIPE, task.pins)
        bar = tqdm(
            total=total, initial=done, disable=not progress or ranks.rank > 0, unit="step", dynamic_ncols=True
        )
        shown: dict[str, str] = {}
        with bar:
            for step in range(done, total):
                epoch, place = divmod(step, per_epoch)
                if place == 0 or step == done:
                    batches = epoch_batches(recipe.seed, epoch, task.num_items, recipe.batch_size)
                    feed = iter(task.feed(epoch, batches[place:, mine]))
                batch = next(feed)
                torch.manual_seed(step_seed(recipe.seed, step))
                last = step + 1 == total
                save = last or (step + 1) % recipe.checkpoint_every == 0
                # log before saving: the log raises on a diverged run before it can replace a good checkpoint
                at = Moment(step, total, epoch, save or (step + 1) % recipe.log_every == 0)
                metrics = task.step(at, batch)
                if at.logged:
                    lines.write(step + 1, "train", metrics)
                    shown |= {key: _short(value) for key, value in metrics.items() if key in SHOWN}
                if last or (step + 1) % (recipe.validate_every * per_epoch) == 0:
                    metrics = task.validate()
                    lines.write(step + 1, "val", metrics)
                    shown["val"] = _short(metrics["loss"])
                    if recipe.select == "best" and (best is None or metrics["loss"] < best["loss"]):
                        best = {"loss": float(metrics["loss"]), "step": step + 1, "weights": task.weights()}
                bar.set_postfix(shown, refresh=False)
                bar.update()
                if save:
                    state = {"task": task.state_dict(), "best": best}
                    save_checkpoint(path, task.pins, step + 1, state, ranks)
        kept = best["weights"] if best else task.weights()
        return {name: whole(tensor) for name, tensor in kept.items()}


SHOWN = ("loss", "accuracy", "usage")  # metrics of the progress bar


def _restore(task: Task, path: Path) -> tuple[int, dict[str, Any] | None]:
    like = task.parameters()
    done, world, state = load_checkpoint(path, task.pins, like, task.ranks)
    try:
        task.load_state_dict(state["task"])
        best = state["best"]
        if best:
            best["weights"] = {n: as_like(t, like[n]) if n in like else t for n, t in best["weights"].items()}
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} does not fit the model of this recipe: {error}") from error
    if world != task.ranks.world and task.ranks.rank == 0:
        log.warning(
            "%s is of %d ranks and goes on with %d: the same images and random numbers, sums in another order",
            path, world, task.ranks.world,
        )  # fmt: skip
    return done, best


def _short(value: Any) -> str:
    """A metric in short: numbers with 3 digits, lists joined by slashes."""
    return "/".join(f"{v:.0f}" for v in value) if isinstance(value, list) else f"{value:.3g}"


class _Log:
    """log.jsonl: one JSON object per line with step, phase and metrics. Lines after step `done` are dropped
    first: a killed run wrote them, and the resumed run writes them again. Metrics must be finite, on the ranks
    that do not write too."""

    def __init__(self, path: Path, done: int, *, writes: bool) -> None:
        kept = [line for line in _lines(path) if line["step"] <= done] if writes else []
        if writes:
            with atomic_write(path) as handle:
                handle.write("".join(json.dumps(line) + "\n" for line in kept).encode())
        self.path, self.writes, self.began = path, writes, time.monotonic()
        self.before = max((float(line.get("seconds", 0)) for line in kept), default=0.0)

    def write(self, step: int, phase: str, metrics: Mapping[str, Any]) -> None:
        seconds = round(self.before + time.monotonic() - self.began, 2)
        values = {key: _rounded(value) for key, value in metrics.items()}
        for key, value in values.items():
            if not np.isfinite(value).all():
                raise RuntimeError(
                    f"the {key} of {phase} must be finite, got {value} at step {step}: lower the learning rate"
                )
        if not self.writes:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "phase": phase, "seconds": seconds, **values}) + "\n")
        except OSError as error:
            raise CheckpointError(f"could not write {self.path}: {error.strerror or error}") from error


def _rounded(value: Any) -> Any:
    return [_rounded(v) for v in value] if isinstance(value, list) else float(f"{float(value):.6g}")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of an earlier log; a line cut off by a kill is skipped."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            log.warning("skipping a broken line in %s", path)
    return [line for line in found if isinstance(line, dict) and "step" in line]
