"""The tokenizer's dry run against a real step, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from var_ext.cli import main
from var_ext.training import TokenizerRecipe
from var_ext.training.loop import Moment
from var_ext.training.plan import GB, PeakMemory
from var_ext.training.tokenizer import TokenizerTask
from var_ext.training.tokenizer_plan import fitting, plan


@pytest.fixture(scope="module")
def full(tokenizer_recipe: TokenizerRecipe) -> TokenizerRecipe:
    """With a critic from the start, and no gradient clipping in the way."""
    return dataclasses.replace(
        tokenizer_recipe, weight_adversarial=0.4, adversarial_start=0.0, adversarial_warmup=0.0, weight_perceptual=1.0,
        perceptual="structural", restart_every=0, dropout=0.1,
    )  # fmt: skip


def test_bytes_and_flops_are_those_of_a_step(full: TokenizerRecipe, images: Path) -> None:
    found, task = plan(full), TokenizerTask(images, full)
    batch = task.train_data.batch(range(12))
    task.step(Moment(0, 100, 0, False), batch)  # makes the optimizers' state
    with PeakMemory() as peak, FlopCounterMode(display=False) as flops:
        task.step(Moment(1, 100, 0, False), batch)
    counted = flops.get_total_flops()
    assert found.parameters == sum(p.numel() for p in task.vae.parameters())
    # counts of hits, clipping and the like are not played
    assert found.activations == pytest.approx(peak.peak, rel=0.15)
    quantizer = (
        found.flops - plan(dataclasses.replace(full, vocab_size=8)).flops
    )  # what is no product is added
    assert found.flops == pytest.approx(counted, rel=0.03) and quantizer > 0
    assert task.critic is not None and task.ema is not None
    critic = sum(p.numel() for p in task.critic.module.parameters())
    assert found.weights == 4 * (found.parameters + critic)
    assert found.optimizer == 4 * (3 * found.parameters + 2 * critic) and found.gradients == 0


def test_settings_that_save_memory_do(full: TokenizerRecipe) -> None:
    without = dataclasses.replace(
        full, ch_mult=(1, 1, 1, 1), weight_adversarial=0.0
    )  # 32 px: layers weigh something
    whole = plan(without)
    assert (
        plan(dataclasses.replace(without, activation_checkpointing=True)).activations
        < 0.6 * whole.activations
    )
    frozen = plan(dataclasses.replace(without, freeze=("encoder", "quantizer"), codebook_init=0))
    assert frozen.optimizer < whole.optimizer and frozen.flops < whole.flops
    halves = plan(dataclasses.replace(full, micro_batch=6))
    whole = plan(full)
    assert (
        halves.activations < whole.activations and halves.flops > whole.flops
    )  # a pass for the adaptive weight
    assert plan(dataclasses.replace(full, shard="optimizer"), 4).optimizer == whole.optimizer // 4


def test_what_does_not_fit_is_refused_with_what_does(full: TokenizerRecipe) -> None:
    recipe = dataclasses.replace(full, weight_adversarial=0.0, dropout=0.0)
    whole = plan(recipe)
    assert fitting(recipe, 1, 1.01 * whole.total / GB) == whole
    with pytest.raises(ValueError, match=r"a rank needs .* GB, got .* GB; --micro-batch \d+ .*needs"):
        fitting(recipe, 1, 0.9 * whole.total / GB)
    with pytest.raises(ValueError, match="one image at once with everything shared out does not fit"):
        fitting(dataclasses.replace(recipe, micro_batch=2), 2, 1e-6)


def test_the_command_prints_the_plan_and_trains_nothing(tmp_path: Path) -> None:
    words = ["train", "tokenizer", "nowhere", "--out", str(tmp_path / "out"), "--preset", "digits"]
    found = CliRunner().invoke(main, [*words, "--dry-run", "--ranks", "4", "--shard", "optimizer"])
    assert found.exit_code == 0 and "a rank of 4, 16 images at once" in found.output, found.output
    assert not (tmp_path / "out").exists()
    for options, message in (
        ("--ranks 2", "--ranks and --memory are of a --dry-run"),
        ("--dry-run --shard optimizer", "shares out over ranks, got one: add --ranks N"),
        ("--dry-run --image-size 48", "image_size must be one of 8, 16, 32, 64, 128, 256"),
        ("--image-size 32 --ch-mult 1,2", "--image-size sets --ch-mult, got both"),
    ):
        found = CliRunner().invoke(main, [*words, *options.split()])
        assert found.exit_code != 0 and message in " ".join(found.output.split()), found.output
    assert torch.is_grad_enabled()
