"""The one training loop: batches, seeds, log, validation, checkpoints and the best weights.

What is trained is a `Task`; to train something else, write another one. All randomness of step s is seeded by
(seed, s) and the batch of step s is a pure function of (seed, s), so a run killed and resumed from its last
checkpoint gives bitwise the weights of an uninterrupted one: on the CPU, on the same machine, with the same
number of threads. On a GPU only up to rounding, since some sums there have no fixed order.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from var_ext.checkpoints import CheckpointError, atomic_write, clear_remains, write_json
from var_ext.checkpoints.training_run import LAST, LOG, RECIPE
from var_ext.grid import save_picture, to_pil
from var_ext.training.board import Board
from var_ext.training.checkpoint import Saver, kept, load_checkpoint
from var_ext.training.extras import need
from var_ext.training.interrupts import STOPPED, Interrupts
from var_ext.training.log import Diverged, Log
from var_ext.training.parallel import as_like, whole
from var_ext.training.precision import tf32
from var_ext.training.ranks import ALONE, Ranks, check_share
from var_ext.training.recipes import Recipe
from var_ext.training.speed import Meter

log = logging.getLogger(__name__)

BOARD, SAMPLES, LOCK = "tensorboard", "samples", ".lock"


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
        rate: factor on the learning rate, below 1 after the run diverged.
    """

    recipe: Recipe
    num_items: int
    device: torch.device
    pins: dict[str, Any]
    ranks: Ranks = ALONE
    rate: float = 1.0

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_items // self.global_batch)

    @property
    def total(self) -> int:
        """Steps of the run."""
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def global_batch(self) -> int:
        """Images of a step, of all ranks."""
        return min(self.recipe.batch_size, self.num_items)

    def meter(self) -> Meter:
        """What measures the speed of its steps."""
        return Meter(self.device, self.global_batch)

    def board(self, folder: Path, done: int) -> Board:
        """What shows its metrics in TensorBoard, from step `done` on."""
        clip = getattr(self.recipe, "clip", math.inf)
        return Board(
            folder, done,
            epoch=self.steps_per_epoch, total=self.total, batch=self.global_batch, clip=clip, sides=self.sides(),
        )  # fmt: skip

    def sides(self) -> list[int] | None:
        """Pixels of an image at each scale of the log's losses, None where they have no scales."""
        return None

    def parameters(self) -> dict[str, Tensor]:
        """What is trained, by name."""
        return {}

    def publish(self, out: Path, checkpoint: str) -> None:  # noqa: B027  a toy has no model
        """Make `out`, where the run's checkpoint is, a model folder: called on one rank before the first step."""

    def picture(self) -> Tensor | None:
        """What the weights to be kept do, (3, H, W) in [0, 1] on the CPU, None on other ranks than the first."""
        return None

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


@contextmanager
def own_folder(out: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """The folder of a run, for this training alone while the block runs.

    It is created first, so that an unwritable one fails before hours of work. The lock ends with its process.

    Raises:
        CheckpointError: nothing can be written there, or another training writes there.
    """
    lock, failure = FileLock(out / LOCK, timeout=0), None
    if ranks.rank == 0:
        try:
            if not (out / LOG).exists():
                with atomic_write(out / LOG):
                    pass
            lock.acquire()
            clear_remains(out)  # whoever left them is gone
        except CheckpointError as error:
            failure = error
        except Timeout:
            failure = CheckpointError(
                f"{out} is in use by another training: wait for its end, or choose another output folder"
            )
        except (OSError, NotImplementedError) as error:  # some network file systems have no locks
            log.warning("%s has no locks (%s): nothing keeps a second training out of it", out, error)
    (failed,) = ranks.any(failure is not None)
    if failed:
        raise failure or CheckpointError(f"rank 0 could not take {out}; its own message says why")
    try:
        yield
    finally:
        lock.release()


@dataclass
class Run:
    """Where a run stands: steps `done`, the `best` weights so far, and how often its learning rate was halved."""

    done: int = 0
    best: dict[str, Any] | None = None
    halvings: int = 0


def fit(task: Task, out: Path, *, resume: bool = True, progress: bool = True) -> dict[str, Tensor]:
    """Train `task` to the end and return the kept weights, on the CPU. All ranks of the task call this together.

    SIGUSR1 writes a checkpoint after the next whole step; SIGTERM too, and then ends the process with status 75.
    Checkpoints are written while training goes on; one that fails ends the run at its next step.

    Args:
        task: what to train.
        out: folder of last.ckpt and log.jsonl, and from the first step on a model folder; created if missing.
        resume: resume from `out`/last.ckpt if it exists; False starts over and overwrites it.
        progress: show a progress bar.

    Raises:
        CheckpointError: the checkpoint is broken or from another run, or `out` cannot be written.
        ValueError: a step has fewer images than there are ranks, or TensorBoard is asked for and not installed.
        Diverged: a metric such as loss or gradient is no longer finite; the last checkpoint is kept.
        SystemExit: status 75, SIGTERM came.
    """
    recipe, ranks, path = task.recipe, task.ranks, out / LAST
    check_share(task.global_batch, ranks.world)
    if recipe.tensorboard:
        need("tensorboard", "tensorboard", "--tensorboard")
    gpus = [task.device] if task.device.type == "cuda" else []
    saver = Saver(path, ranks, recipe.keep)
    with torch.random.fork_rng(devices=gpus), tf32(recipe.tf32), saver:
        if resume and path.exists():
            run = _restore(task, path)
            log.info("resuming %s at step %d of %d", path, run.done, task.total)
        else:
            run = Run()
            torch.manual_seed(step_seed(recipe.seed, task.total))
            task.start()
            _save(task, saver, run)
            saver.wait()
        if ranks.rank == 0:
            write_json(out / RECIPE, task.pins)
            if run.done < task.total:
                task.publish(out, path.name)
        task.load_data()
        lines = _open_log(task, out, run)
        with Interrupts(ranks, recipe.checkpoint_minutes) as interrupts:
            while True:
                try:
                    _train(task, saver, run, lines, interrupts, progress)
                    break
                except Diverged as error:
                    message = str(error)
                # outside the handler, whose traceback holds the batches of the broken step
                saver.wait()  # or ranks would go back to different checkpoints
                run = _go_back(task, path, message, run.halvings)
                lines = _open_log(task, out, run)
                lines.write(run.done, "halve", {"rate": task.rate})
            saver.wait()
        kept = run.best["weights"] if run.best else task.weights()
        return {name: whole(tensor) for name, tensor in kept.items()}


def _open_log(task: Task, out: Path, run: Run) -> Log:
    """The log after `run.done` steps, with TensorBoard's beside it if the recipe asks for it."""
    writes = task.ranks.rank == 0
    board = task.board(out / BOARD, run.done) if writes and task.recipe.tensorboard else None
    return Log(out / LOG, run.done, writes=writes, board=board)


def _train(task: Task, saver: Saver, run: Run, lines: Log, interrupts: Interrupts, progress: bool) -> None:
    """The steps that are left."""
    recipe, ranks, total, per_epoch = task.recipe, task.ranks, task.total, task.steps_per_epoch
    mine = ranks.rows(task.global_batch)
    meter, shown = task.meter(), dict[str, str]()
    hidden = not progress or ranks.rank > 0
    with tqdm(total=total, initial=run.done, disable=hidden, unit="step", dynamic_ncols=True) as bar:
        for step in range(run.done, total):
            epoch, place = divmod(step, per_epoch)
            if place == 0 or step == run.done:
                batches = epoch_batches(recipe.seed, epoch, task.num_items, recipe.batch_size)
                feed = iter(task.feed(epoch, batches[place:, mine]))
            with meter.waiting():
                batch = next(feed)
            torch.manual_seed(step_seed(recipe.seed, step))
            last = step + 1 == total
            asked, stop, failed = interrupts.asked(saver.failed())
            if failed:
                raise saver.error or CheckpointError(f"could not write {saver.path} on another rank")
            save = asked or last or (step + 1) % recipe.checkpoint_every == 0
            # log before saving: the log raises on a diverged run before it can replace a good checkpoint
            at = Moment(step, total, epoch, save or (step + 1) % recipe.log_every == 0)
            metrics = task.step(at, batch)
            if at.logged:
                metrics = {**metrics, **meter.read()}
                lines.write(step + 1, "train", metrics)
                shown |= {key: _short(value) for key, value in metrics.items() if key in SHOWN}
            periods = [recipe.validate_every * per_epoch, recipe.validate_steps]
            if last or any(period and (step + 1) % period == 0 for period in periods):
                with meter.pause():
                    metrics = task.validate()
                lines.write(step + 1, "val", metrics)
                shown["val"] = _short(metrics["loss"])
                loss = metrics[SELECTED_BY[recipe.select]]
                if recipe.select != "last" and (run.best is None or loss < run.best["loss"]):
                    run.best = {"loss": float(loss), "step": step + 1, "weights": task.weights()}
            if recipe.sample_every and (last or (step + 1) % (recipe.sample_every * per_epoch) == 0):
                with meter.pause():
                    picture = task.picture()
                    if picture is not None:
                        save_picture(
                            to_pil(picture[None])[0], saver.path.parent / SAMPLES / f"{epoch + 1:04}.png"
                        )
                        lines.show(step + 1, picture)
                    ranks.wait()  # for the one that draws; waiting in the next step has its limit
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if save:
                with meter.pause():
                    _save(task, saver, replace(run, done=step + 1))
                interrupts.saved()
            if stop and not last:
                bar.close()
                saver.wait()  # all of them: a rank that ends makes the launcher end the others
                if ranks.rank == 0:
                    log.warning(
                        "SIGTERM: stopped after step %d of %d, saved in %s; the same command goes on",
                        step + 1, total, saver.path,
                    )  # fmt: skip
                raise SystemExit(STOPPED)


SELECTED_BY = {"last": "loss", "best": "loss", "best_last_scale": "loss_last"}  # metric of validation
# metrics of the progress bar
SHOWN = ("loss", "accuracy", "usage", "perplexity", "lr", "images_per_second", "mfu")
HALVINGS = 3  # of the learning rate of a diverged run, at most


def _save(task: Task, saver: Saver, run: Run) -> None:
    state = {"task": task.state_dict(), "best": run.best, "halvings": run.halvings}
    saver.save(task.pins, run.done, state)


def _restore(task: Task, path: Path) -> Run:
    like = task.parameters()
    done, world, epochs, state = load_checkpoint(path, task.pins, like, task.ranks)
    try:
        task.load_state_dict(state["task"])
        best = state["best"]
        if best:
            best["weights"] = {n: as_like(t, like[n]) if n in like else t for n, t in best["weights"].items()}
        halvings = int(state.get("halvings", 0))
    except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not fit the model of this recipe: {why}") from error
    if world != task.ranks.world and task.ranks.rank == 0:
        log.warning(
            "%s is of %d ranks and goes on with %d: the same images and random numbers, sums in another order",
            path, world, task.ranks.world,
        )  # fmt: skip
    if epochs < task.recipe.epochs and task.ranks.rank == 0:
        log.warning(
            "%s is of %d epochs and goes on at step %d for %d: from here on with the schedules of the longer run",
            path, epochs, done, task.recipe.epochs,
        )  # fmt: skip
    task.rate = 0.5**halvings
    return Run(done, best, halvings)


def _go_back(task: Task, path: Path, message: str, halvings: int) -> Run:
    """The run at its last checkpoint with half the learning rate; Diverged where that is not to be done (again)."""
    rate = "--base-lr" if hasattr(task.recipe, "base_lr") else "--lr"
    if task.recipe.on_divergence == "stop":
        raise Diverged(
            f"{message}: lower {rate} and start anew, or go on with --on-divergence halve{kept(path)}"
        )
    if halvings == HALVINGS:
        raise Diverged(f"{message}, with a learning rate halved {HALVINGS} times: lower {rate}{kept(path)}")
    run = replace(_restore(task, path), halvings=halvings + 1)
    task.rate = 0.5**run.halvings
    if task.ranks.rank == 0:
        log.warning("%s: back to step %d with %g of the learning rate", message, run.done, task.rate)
    return run


def _short(value: Any) -> str:
    """A metric in short: numbers with 3 digits, lists joined by slashes."""
    return "/".join(f"{v:.0f}" for v in value) if isinstance(value, list) else f"{value:.3g}"
