"""The tokenizer's trainer: it learns, logs, keeps the average, and its optional losses enter."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from var_ext.checkpoints import CheckpointError, load_tokenizer
from var_ext.data import DataError, load_dataset
from var_ext.models import VQVAE
from var_ext.models.quantizer import MultiScaleQuantizer
from var_ext.training import TokenizerRecipe, train_tokenizer
from var_ext.training.critics import PatchDiscriminator
from var_ext.training.loop import Moment
from var_ext.training.optim import in_place
from var_ext.training.tokenizer import TokenizerTask
from var_ext.training.usage import figures


def rows(folder: Path, phase: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == phase]


def test_a_short_training_learns_and_logs(tokenizer: Path, tokenizer_recipe: TokenizerRecipe) -> None:
    train, val = rows(tokenizer, "train"), rows(tokenizer, "val")
    assert len(train) == 18 and len(val) == 6  # 36 images in batches of 12, 6 epochs
    assert val[-1]["l2"] < 0.7 * val[0]["l2"]  # type: ignore[operator]
    assert {"loss", "l1", "vq", "grad", "usage", "perplexity", "restarted"} <= {
        key for row in train for key in row
    }
    assert len(val[0]["usage"]) == len(val[0]["perplexity"]) == 3  # type: ignore[arg-type]
    recipe = json.loads((tokenizer / "recipe.json").read_text())
    assert recipe["kind"] == "tokenizer" and recipe["perceptual"] is None
    assert recipe["discriminator"] is None and recipe["recipe"] == tokenizer_recipe.beginning(False).pinned()


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

    plain, recipe = (
        TokenizerTask(images, tokenizer_recipe),
        tokenizer_recipe.with_options(weight_perceptual=0.5),
    )
    task = TokenizerTask(images, recipe, perceptual=hook)
    output, target = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    assert float(task.losses(output, target)[0] - plain.losses(output, target)[0]) == pytest.approx(0.5)
    assert seen == [(2, 3, 8, 8, 2, 3, 8, 8)]
    assert task.pins["perceptual"].endswith("test_the_perceptual_hook_is_called_and_weighs.<locals>.hook")
    assert task.pins["recipe"]["weight_perceptual"] == 0.5
    named = TokenizerTask(images, recipe, perceptual=torch.nn.L1Loss())
    assert named.pins["perceptual"] == "torch.nn.modules.loss.L1Loss"


def test_a_weight_without_a_loss_is_refused_with_the_remedies(
    images: Path, tokenizer_recipe: TokenizerRecipe
) -> None:
    recipe = tokenizer_recipe.with_options(weight_perceptual=1)
    with pytest.raises(
        ValueError, match=r"weight_perceptual = 1 needs a loss.*--lpips FILE .*stlpips.*structural"
    ):
        TokenizerTask(images, recipe)
    assert (
        TokenizerTask(images, recipe.with_options(perceptual="structural")).pins["perceptual"] == "structural"
    )


def test_the_discriminator_begins_at_its_share_and_trains(
    images: Path, tokenizer_recipe: TokenizerRecipe
) -> None:
    recipe = tokenizer_recipe.with_options(
        weight_adversarial=0.4, adversarial_start=0.5, adversarial_warmup=0.1
    )
    task = TokenizerTask(images, recipe)
    assert task.critic is not None
    assert [task.critic.weight(p) > 0 for p in (0.0, 0.5, 0.51, 1.0)] == [False, False, True, True]
    assert task.critic.weight(0.55) == pytest.approx(0.5) and task.critic.weight(0.9) == 1.0
    batch = task.train_data.batch(range(12))
    module = task.critic.module
    before = [p.detach().clone() for p in module.parameters()]
    early = task.step(Moment(0, 100, 0, True), batch)
    assert "critic" not in early
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    late = task.step(Moment(80, 100, 0, True), batch)
    assert late["critic"] > 0 and "adversarial" in late
    assert not all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_a_step_by_hand(images: Path, tokenizer_recipe: TokenizerRecipe) -> None:
    recipe = tokenizer_recipe.with_options(
        weight_adversarial=0.4, adversarial_start=0.5, adversarial_warmup=0.1, weight_l1=0.3, weight_l2=0.9,
        weight_vq=0.7, weight_perceptual=0.6, clip=0.01, lr_end=0.2, warmup=0.1, restart_every=0,
        weight_decay=0.1, critic_lr=2e-3, critic_warmup=0.1, critic_weight_decay=0.2, critic_spectral_norm=False,
        critic_augment=0.0, critic_blur=0.0, bcr=0.0, adaptive_clamp=(0.0, 1e4),
    )  # fmt: skip
    task = TokenizerTask(images, recipe, perceptual=torch.nn.SmoothL1Loss())
    assert task.critic is not None and task.ema is not None
    batch = task.train_data.batch(range(12))
    target, vae, critic = batch[0], copy.deepcopy(task.vae).train(), copy.deepcopy(task.critic.module)
    average = {name: value.clone() for name, value in task.ema.average.items()}
    task.step(Moment(560, 1001, 0, False), batch)

    output, _, vq = vae(target)
    near = 0.3 * (output - target).abs().mean() + 0.9 * (output - target).square().mean()
    near = near + 0.6 * torch.nn.SmoothL1Loss()(output, target)
    fooled = critic(output).mean()  # the decoder raises the critic's logits
    last = vae.decoder.conv_out.weight
    pull, push = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (near, fooled))
    ramp = (560 / 1001 - 0.5) / 0.1
    (near + 0.7 * vq - ramp * 0.4 * pull / (push + 1e-6) * fooled).backward()
    real, fake = critic(target), critic(output.detach())
    critic.zero_grad()
    ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()).backward()

    passed = (560 - 100) / 900  # after 100 steps of warm-up
    lr = 1e-3 * (0.2 + 0.8 * (0.5 + 0.5 * math.cos(math.pi * passed)))
    own = 2e-3 * (0.005 + 0.995 * 60 / 100)  # the critic began at step 500 of 1001
    optimizers = [
        (task.optimizer, task.vae, vae, lr, 0.1),
        (task.critic.optimizer, task.critic.module, critic, own, 0.2),
    ]
    for optimizer, found, wanted, lr, decay in optimizers:
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(lr) and group["betas"] == (0.5, 0.9)
            assert group["weight_decay"] == (decay if group["decay"] else 0)
        names = {name for name, p in found.named_parameters() if p.ndim > 1 and "embedding" not in name}
        decays = [lr * decay * (name in names) for name, _ in found.named_parameters()]
        norm = torch.stack([p.grad.norm() for p in wanted.parameters() if p.grad is not None]).norm()
        assert norm > 2 * recipe.clip
        for p, q, gone in zip(found.parameters(), wanted.parameters(), decays, strict=True):
            if p.grad is not None and q.grad is not None:
                # two orders of summation in fp32, of gradients with a norm of 0.01
                torch.testing.assert_close(p.grad, q.grad * recipe.clip / norm, rtol=1e-3, atol=1e-7)
                # the first step of Adam moves every weight by lr, against the sign of its gradient
                step = lr * p.grad / (p.grad.abs() + 1e-8)
                torch.testing.assert_close(p.detach(), (1 - gone) * q.detach() - step, rtol=1e-5, atol=1e-6)
    for name, p in task.vae.named_parameters():
        torch.testing.assert_close(task.ema.average[name], 0.9 * average[name] + 0.1 * p.detach())


def test_validation_takes_the_average_and_leaves_the_weights_alone(
    images: Path, tokenizer_recipe: TokenizerRecipe
) -> None:
    task = TokenizerTask(images, tokenizer_recipe)
    for step in range(3):
        task.step(Moment(step, 10, 0, False), task.train_data.batch(range(12)))
    before = {name: tensor.clone() for name, tensor in task.vae.state_dict().items()}
    loss = task.validate()["loss"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.vae.state_dict().items())
    task.vae.load_state_dict(task.weights())
    task.ema = None
    assert task.validate()["loss"] == loss
    task.vae.load_state_dict(before)
    assert task.validate()["loss"] != loss


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_validation_counts_the_tokens_of_its_reconstructions(
    images: Path, tokenizer_recipe: TokenizerRecipe, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TokenizerTask(images, tokenizer_recipe.with_options(autocast=precision, micro_batch=5))
    quantize, features, seen, passes = MultiScaleQuantizer.quantize, VQVAE.features, [], []

    def watched(self: MultiScaleQuantizer, *arguments: Any, **options: Any) -> Any:
        seen.append(quantize(self, *arguments, **options))
        return seen[-1]

    def counted(vae: VQVAE, batch: Tensor) -> Tensor:
        passes.append(len(batch))
        return features(vae, batch)

    monkeypatch.setattr(MultiScaleQuantizer, "quantize", watched)
    monkeypatch.setattr(VQVAE, "features", counted)
    found = task.validate()
    assert sum(passes) == len(task.val_data)
    tokens = torch.cat([each[0] for each in seen])
    hits = task.vae.quantize.hits(tokens)
    assert found["usage"] == figures(hits)["usage"] and found["perplexity"] == figures(hits)["perplexity"]
    # and its losses are those of the pass in training
    with in_place(task.vae, task.ema), torch.no_grad():
        x = task.val_data.batch(range(len(task.val_data)))[0]
        output, _ = task.reconstruct(task.vae.eval(), x)
    assert found["l2"] == pytest.approx(float((output - x).square().mean()), rel=1e-4)


def test_the_first_codes_are_computed_batch_by_batch(
    images: Path, tokenizer_recipe: TokenizerRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, features, sizes = TokenizerTask(images, tokenizer_recipe), VQVAE.features, []

    def counting(vae: VQVAE, batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return features(vae, batch)

    monkeypatch.setattr(VQVAE, "features", counting)
    task.start()
    assert sizes == [12, 12, 12]


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_the_discriminator_takes_images_of_any_size(size: int) -> None:
    assert PatchDiscriminator(size)(torch.zeros(2, 3, size, size)).shape[:2] == (2, 1)


def test_the_discriminator_refuses_what_is_too_small() -> None:
    with pytest.raises(ValueError, match="at least 8 x 8 pixels, got 4"):
        PatchDiscriminator(4)


def test_moved_codes_move_in_the_average_too(images: Path, tokenizer_recipe: TokenizerRecipe) -> None:
    task = TokenizerTask(images, tokenizer_recipe)
    batch = task.train_data.batch(range(12))[0]
    task.step(Moment(0, 100, 0, True), (batch, batch))
    task.vae.quantize.ema_vocab_hit_SV.fill_(1.0)[:, 3] = 0.0
    assert task.restart([batch]) == 1
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


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("cut", "late"), [(slice(20, None), False), (slice(200, None), False), (slice(60, 90), True)]
)
def test_a_broken_image_ends_the_run_with_its_name_alone(
    images: Path, tokenizer_recipe: TokenizerRecipe, tmp_path: Path, workers: int, cut: slice, late: bool
) -> None:
    data = shutil.copytree(images, tmp_path / "data")
    for path in (data / "class1").iterdir():
        content = bytearray(path.read_bytes())
        del content[cut]
        path.write_bytes(content)
    recipe = tokenizer_recipe.with_options(workers=workers, codebook_init=0)
    with pytest.raises(DataError, match=r"^wanted a readable image, got [^\n]*class1[^\n]*$"):
        train_tokenizer(data, tmp_path / "out", recipe, progress=False)
    # a broken header and a missing end are found before the first step
    assert (tmp_path / "out" / "recipe.json").exists() == late


def test_other_images_do_not_take_the_checkpoint(
    images: Path, tokenizer_recipe: TokenizerRecipe, tmp_path: Path
) -> None:
    data, recipe = shutil.copytree(images, tmp_path / "data"), tokenizer_recipe.with_options(epochs=1)
    train_tokenizer(data, tmp_path / "out", recipe, progress=False)
    train_tokenizer(images, tmp_path / "out", recipe, progress=False)  # the same images elsewhere
    val = TokenizerTask(data, recipe).val_data
    shutil.copyfile(val.paths[0], val.paths[1])  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"another run: validation images changed\. Start"):
        train_tokenizer(data, tmp_path / "out", recipe, progress=False)


def test_a_finished_run_refuses_another_recipe(
    images: Path, tokenizer: Path, tokenizer_recipe: TokenizerRecipe
) -> None:
    with pytest.raises(CheckpointError, match=r"wanted recipe\.lr = 0\.5, got 0\.001"):
        train_tokenizer(images, tokenizer, tokenizer_recipe.with_options(lr=0.5), progress=False)
