"""A run killed with SIGKILL at a random step and resumed ends bitwise as one that was never killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from var_ext.checkpoints import load_tensors
from var_ext.training import Recipe, TokenizerRecipe, VARRecipe, train_tokenizer, train_var

CHILD = """
import sys, torch
torch.set_num_threads(1)
from var_ext.training import TokenizerRecipe, VARRecipe, train_tokenizer, train_var
recipe = {recipe!r}
{call}
"""


def kill_at(step: int, script: str, log: Path) -> None:
    """Run `script` and kill it once `log` has a line of `step`."""
    child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_bytes().count(b'"train"') >= step:
            break
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    _, errors = child.communicate()
    assert child.returncode == -signal.SIGKILL, errors.decode()


def same_weights(a: Path, b: Path, name: str) -> bool:
    one, two = load_tensors(a / name), load_tensors(b / name)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("kind", [pytest.param("tokenizer", marks=pytest.mark.slow), "var"])
def test_a_killed_run_ends_with_the_same_weights(
    kind: str,
    images: Path,
    tokenizer: Path,
    tokenizer_recipe: TokenizerRecipe,
    var_recipe: VARRecipe,
    tmp_path: Path,
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    recipe: Recipe
    run: Callable[[Path], Path]
    if kind == "tokenizer":
        recipe = toy = tokenizer_recipe.with_options(
            weight_adversarial=0.4, adversarial_start=0.2, epochs=10, checkpoint_every=4,
            weight_perceptual=1, perceptual="structural", lecam=0.3, critic_throttle=1.9,
        )  # fmt: skip
        call, run = (
            f"train_tokenizer({str(images)!r}, {str(cut)!r}, recipe, progress=False)",
            lambda out: train_tokenizer(images, out, toy, progress=False),
        )
    else:
        recipe = tiny = var_recipe.with_options(epochs=20, validate_every=3, checkpoint_every=7)
        call, run = (
            f"train_var({str(images)!r}, {str(tokenizer)!r}, {str(cut)!r}, recipe, progress=False)",
            lambda out: train_var(images, tokenizer, out, tiny, progress=False),
        )
    steps = 3 * recipe.epochs  # 36 images in batches of 12
    step = random.SystemRandom().randrange(1, steps // 2)  # far enough from the end to be killed before it
    kill_at(step, CHILD.format(recipe=recipe, call=call), cut / "log.jsonl")
    assert "training" in json.loads((cut / "config.json").read_text()), (
        f"the run ended before it was killed at step {step}"
    )
    run(cut)
    run(whole)
    assert same_weights(whole, cut, "vae.safetensors"), f"killed at step {step}"
    if kind == "var":
        assert same_weights(whole, cut, "var.safetensors"), f"killed at step {step}"
