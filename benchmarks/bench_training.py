"""End to end: training steps of both recipes of the bundled model, from a batch in memory to updated weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness.case import Case

import var_ext
from var_ext import backend
from var_ext.training import TokenizerRecipe, VARRecipe
from var_ext.training.loop import Moment, Task
from var_ext.training.tokenizer import TokenizerTask
from var_ext.training.var import VARTask

SHAPES = {
    "tokenizer, a step of 64": dict(model="tokenizer", batch=64),
    "transformer, a step of 64": dict(model="transformer", batch=64),
}
SMOKE = dict(model="transformer", batch=2)


def case(model: str, batch: int) -> Case:
    moment = Moment(step=0, total=1000, epoch=0, logged=True)

    def trained(choice: str) -> Callable[[], Any]:
        task: Task
        if model == "tokenizer":
            task = TokenizerTask("digits", replace(TokenizerRecipe.digits(), batch_size=batch))
            given = task.train_data.batch(torch.arange(batch))
        else:
            vae = var_ext.load("digits").vae
            task = VARTask(
                "digits", vae, Path(tempfile.mkdtemp()), replace(VARRecipe.digits(), batch_size=batch)
            )
            given = (
                torch.randint(vae.vocab_size, (batch, vae.schedule.num_tokens)),
                torch.arange(batch) % task.var.num_classes,
            )

        def call() -> Any:
            torch.manual_seed(0)  # the same dropout for both
            with backend.force(choice):
                return task.step(moment, given)

        return call

    return Case(
        {"var_ext": trained("native"), "reference": trained("reference")},
        images=batch,
        check=same_loss,
        lap=1.0,
    )


def same_loss(result: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """After equally many steps from the same weights, the losses agree to rounding."""
    assert abs(float(result["loss"]) - float(expected["loss"])) <= 1e-3 * abs(float(expected["loss"]))
