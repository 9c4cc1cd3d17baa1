"""The tokenizer's trainer: it learns, logs, keeps the average, and its optional losses enter."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from var_ext.data import DataError, load_dataset
from var_ext.files import CheckpointError
from var_ext.hub import load_tokenizer
from var_ext.training import TokenizerRecipe, train_tokenizer
from var_ext.training.loop import Moment
from var_ext.training.losses import PatchDiscriminator, adaptive_weight, hinge_loss, reconstruction_loss
from var_ext.training.tokenizer import TokenizerTask


def rows(folder: Path, phase: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == phase]


def test_a_short_training_learns_and_logs(tokenizer: Path, tokenizer_recipe: TokenizerRecipe) -> None:
    train, val = rows(tokenizer, "train"), rows(tokenizer, "val")
    assert len(train) == 18 and len(val) == 6  # 36 images in batches of 12, 6 epochs
    assert val[-1]["l2"] < 0.7 * val[0]["l2"]  # type: ignore[operator]
    assert {"loss", "l1", "vq", "grad", "usage", "restarted"} <= {key for row in train for key in row}
    assert len(val[0]["usage"]) == 3  # type: ignore[arg-type]
    recipe = json.loads((tokenizer / "recipe.json").read_text())
    assert recipe["kind"] == "tokenizer" and recipe["recipe"] == tokenizer_recipe.pinned()


def test_the_folder_holds_the_average_that_was_validated(tokenizer: Path, images: Path) -> None:
    vae = load_tokenizer(tokenizer)
    data = load_dataset(images, "val", 8)
    batch = data.batch(range(len(data)))[0]
    error = float((vae(batch)[0] - batch).square().mean())
    # the log keeps six digits
    assert error == pytest.approx(rows(tokenizer, "val")[-1]["l2"], rel=1e-4)


def test_the_perceptual_hook_is_called_and_weighs(images: Path, tokenizer_recipe: TokenizerRecipe) -> None:
    seen: list[tuple[int, ...]] = []

    def hook(output: Tensor, target: Tensor) -> Tensor:
        seen.append((*output.shape, *target.shape))
        return (output - target).abs().mean((1, 2, 3))

    plain = TokenizerTask(images, tokenizer_recipe)
    task = TokenizerTask(images, tokenizer_recipe, perceptual=hook)
    output, target = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    assert float(task.distance(output, target) - plain.distance(output, target)) == pytest.approx(0.5)
    assert seen == [(2, 3, 8, 8, 2, 3, 8, 8)]


def test_the_discriminator_begins_at_its_share_and_trains(
    images: Path, tokenizer_recipe: TokenizerRecipe
) -> None:
    recipe = tokenizer_recipe.with_options(
        weight_adversarial=0.4, adversarial_start=0.5, adversarial_warmup=0.1
    )
    task = TokenizerTask(images, recipe)
    assert task.critic is not None
    assert [task.adversarial_ramp(p) > 0 for p in (0.0, 0.5, 0.51, 1.0)] == [False, False, True, True]
    assert task.adversarial_ramp(0.55) == pytest.approx(0.5) and task.adversarial_ramp(0.9) == 1.0
    batch = task.train_data.batch(range(12))
    before = [p.detach().clone() for p in task.critic.parameters()]
    early = task.step(Moment(0, 100, 0, True), batch)
    assert "critic" not in early
    assert all(torch.equal(a, b) for a, b in zip(before, task.critic.parameters(), strict=True))
    late = task.step(Moment(80, 100, 0, True), batch)
    assert late["critic"] > 0 and "adversarial" in late
    assert not all(torch.equal(a, b) for a, b in zip(before, task.critic.parameters(), strict=True))


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_the_discriminator_takes_images_of_any_size(size: int) -> None:
    assert PatchDiscriminator(size)(torch.zeros(2, 3, size, size)).shape[:2] == (2, 1)


def test_the_discriminator_refuses_what_is_too_small() -> None:
    with pytest.raises(ValueError, match="at least 8 x 8 pixels, got 4"):
        PatchDiscriminator(4)


def test_losses_by_hand() -> None:
    assert reconstruction_loss(torch.tensor([2.0]), torch.tensor([0.0]), 0.2, 1.0).item() == pytest.approx(
        4.4
    )
    assert hinge_loss(torch.tensor([2.0, 0.0]), torch.tensor([-0.5])).item() == pytest.approx(
        0.5 * (0.5 + 0.5)
    )
    last = torch.ones(1, requires_grad=True)
    assert adaptive_weight(6 * last, 2 * last, last).item() == pytest.approx(
        3, rel=1e-3
    )  # 1e-4 in the denominator


def test_moved_codes_move_in_the_average_too(images: Path, tokenizer_recipe: TokenizerRecipe) -> None:
    task = TokenizerTask(images, tokenizer_recipe)
    batch = task.train_data.batch(range(12))[0]
    task.step(Moment(0, 100, 0, True), (batch, batch))
    task.vae.quantize.ema_vocab_hit_SV.fill_(1.0)[:, 3] = 0.0
    assert task.restart(batch) == 1
    assert task.ema is not None
    assert torch.equal(task.weights()["quantize.embedding.weight"][3], task.vae.quantize.embedding.weight[3])


def test_bad_data_and_bad_folders_are_named(
    images: Path, tokenizer_recipe: TokenizerRecipe, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="nowhere, which does not exist"):
        train_tokenizer(tmp_path / "nowhere", tmp_path / "out", tokenizer_recipe, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"could not write .*file"):
        train_tokenizer(images, tmp_path / "file" / "out", tokenizer_recipe, progress=False)


def test_a_finished_run_refuses_another_recipe(
    images: Path, tokenizer: Path, tokenizer_recipe: TokenizerRecipe
) -> None:
    with pytest.raises(CheckpointError, match=r"wanted recipe\.lr = 0\.5, got 0\.001"):
        train_tokenizer(images, tokenizer, tokenizer_recipe.with_options(lr=0.5), progress=False)
