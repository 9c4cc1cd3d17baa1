"""TensorBoard: the lines of the log as curves, a transformer's under the names that the published trainer uses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

Metrics = Mapping[str, Any]


class Board:
    """Writes curves into a folder; a resumed run goes on after step `done`.

    Args:
        epoch: steps of one.
        total, batch: steps of the run, images of a step.
        clip: largest norm of the gradient.
        sides: pixels of an image at each scale, for the published names of a transformer; None for a tokenizer's run.
    """

    def __init__(
        self,
        folder: Path,
        done: int,
        *,
        epoch: int,
        total: int,
        batch: int,
        clip: float,
        sides: list[int] | None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=done + 1)
        self.epoch, self.total, self.batch, self.clip, self.sides = epoch, total, batch, clip, sides
        self.done, self.lines = done, list[Metrics]()

    def remember(self, lines: list[dict[str, Any]]) -> None:
        """Earlier lines of the log, for the means of the epoch that a resumed run is in."""
        began = self.done // self.epoch * self.epoch
        self.lines = [line for line in lines if line["phase"] == "train" and line["step"] > began]

    def add(self, step: int, phase: str, metrics: Metrics) -> None:
        """The metrics of a line of the log."""
        if self.sides is None or phase not in ("train", "val"):
            curves = _plain(phase, metrics)
        elif phase == "train":
            curves = self._iteration(step, metrics)
        else:
            curves = _means("v", [metrics])
        for name, value in curves:
            # epochs are the steps of what is said of epochs, as published
            self.writer.add_scalar(name, value, step // self.epoch if name.startswith("AR_ep") else step)
        if self.sides is not None and phase == "train":
            self.lines.append(metrics)
            if step % self.epoch == 0:
                for name, value in _means("", self.lines):
                    self.writer.add_scalar(name, value, step // self.epoch)
                self.lines = []
        self.writer.flush()

    def picture(self, step: int, picture: Tensor) -> None:
        """(3, H, W) in [0, 1]."""
        self.writer.add_image("samples", picture, step)
        self.writer.flush()

    def _iteration(self, step: int, metrics: Metrics) -> Iterator[tuple[str, float]]:
        assert self.sides is not None
        for end in ("min", "max"):  # published: over the groups of the optimizer, which share the rate here
            yield f"AR_opt_lr/lr_{end}/sche_tlr", metrics["lr"]
        yield "AR_opt_wd/wd_max/sche_twd", metrics["weight_decay"]
        yield "AR_opt_wd/wd_min/sche_twd", 0.0
        if "grad" in metrics:
            yield "AR_opt_grad/grad/grad_norm", metrics["grad"]
            yield "AR_opt_grad/grad/grad_clip", self.clip
        if "scale" in metrics:
            yield "AR_opt_grad/fp16/scale_log2", math.log2(metrics["scale"])
        yield "AR_iter_loss/z_voc_usage", metrics["codes"]
        for side, loss, accuracy in zip(
            self.sides, metrics["loss_scales"], metrics["accuracy_scales"], strict=False
        ):
            yield f"AR_iter_loss/L_{side}", loss
            yield f"AR_iter_loss/acc_{side}", accuracy
        if "stage" in metrics:
            yield "AR_iter_schedule/prog_a_reso", self.sides[int(metrics["stage"])]
            yield "AR_iter_schedule/prog_si", metrics["stage"]
            yield "AR_iter_schedule/prog_wp", metrics["stage_weight"]
        if metrics.get("images_per_second"):
            left = (self.total - step) * self.batch / metrics["images_per_second"]
            yield "AR_z_burnout/rest_hours", left / 3600
        yield from _plain("speed", {name: metrics[name] for name in SPEED if name in metrics})


SPEED = ("images_per_second", "tokens_per_second", "data_wait", "peak_memory", "mfu")


def _means(prefix: str, lines: list[Metrics]) -> Iterator[tuple[str, float]]:
    """Mean of some lines, under the published names of an epoch."""
    for name, key in (("L", "loss"), ("acc", "accuracy")):
        for end, ending in (("mean", ""), ("tail", "_last")):
            yield (
                f"AR_ep_loss/{prefix}{name}_{end}",
                sum(line[key + ending] for line in lines) / len(lines),
            )


def _plain(phase: str, metrics: Metrics) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, list):
            yield from ((f"{phase}/{name}/{k}", each) for k, each in enumerate(value))
        else:
            yield f"{phase}/{name}", value
