"""The transformer's trainer: it learns, selects, honours labels, and can train scale after scale."""

import copy
import json
import logging
import math
from pathlib import Path

import pytest
import torch

import var_ext
from var_ext.checkpoints import CheckpointError, load_tokenizer
from var_ext.checkpoints.tensors import load_tensors
from var_ext.models import VAR
from var_ext.models.keyed import row_keys
from var_ext.schedule import ScaleSchedule
from var_ext.training import TokenizerRecipe, VARRecipe, train_tokenizer, train_var
from var_ext.training.loop import Moment, epoch_batches, step_seed
from var_ext.training.ranks import ALONE
from var_ext.training.tally import Tally, token_losses
from var_ext.training.tokens import CachedTokens
from var_ext.training.var import VARTask


def make(images: Path, tokenizer: Path, recipe: VARRecipe, cache: Path) -> VARTask:
    task = VARTask(images, load_tokenizer(tokenizer), cache, recipe)
    task.load_data()
    return task


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_nothing(
    images: Path, tokenizer_recipe: TokenizerRecipe, var_recipe: VARRecipe, tmp_path: Path, dtype: torch.dtype
) -> None:
    found = []
    for default in (torch.float32, dtype):
        out = tmp_path / str(default)
        torch.set_default_dtype(default)
        try:
            train_tokenizer(images, out / "vae", tokenizer_recipe.with_options(epochs=1), progress=False)
            train_var(images, out / "vae", out / "var", var_recipe.with_options(epochs=1), progress=False)
            drawn = var_ext.load(out / "var", precision="fp32")([0, 1], [2, 3])
            assert torch.get_default_dtype() == default and drawn.dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)
        entries = {
            **load_tensors(out / "var" / "vae.safetensors"),
            **load_tensors(out / "var" / "var.safetensors"),
        }
        found.append({**entries, "drawn": drawn})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert tensor.dtype == found[1][name].dtype and torch.equal(tensor, found[1][name]), name


def test_a_short_training_learns_and_logs(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    val = [line for line in lines if line["phase"] == "val"]
    assert len(val) == 6 and val[-1]["loss"] < 0.9 * math.log(16)  # 16 codes; a fresh model knows nothing
    assert len(val[0]["accuracy_scales"]) == len(val[0]["usage"]) == 3
    train = [line for line in lines if line["phase"] == "train"]
    assert len(train) == 18 and {"loss", "accuracy", "grad", "usage"} <= set(train[0])


def test_the_result_is_a_model(trained: Path, images: Path) -> None:
    sampler = var_ext.load(trained)
    assert sampler.class_names == ["class0", "class1"]
    drawn = sampler(labels=[0, 1], seeds=[3, 4])
    assert drawn.shape == (2, 3, 8, 8) and drawn.min() >= 0 and drawn.max() <= 1


def test_the_best_weights_by_validation_loss_are_stored(
    trained: Path, images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    task = make(images, tokenizer, var_recipe.with_options(ema=0), tmp_path)
    task.var.load_state_dict(var_ext.load(trained).var.state_dict())
    best = min(line["loss"] for line in lines if line["phase"] == "val")
    assert task.validate()["loss"] == pytest.approx(best, rel=1e-4)  # the log keeps six digits


def test_validation_uses_the_true_labels_without_dropout(
    images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    task = make(images, tokenizer, var_recipe.with_options(cond_drop_rate=1.0, ema=0), tmp_path)
    ((tokens, labels),) = task.val_tokens.feed(0, [torch.arange(4)])
    assert labels.tolist() == [0, 0, 1, 1]
    task.var.eval()
    parts = [tokens[:, where] for where in task.schedule.slices]
    logits = task.var(labels, task.vae.quantize.idxBl_to_var_input(parts))
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    found = task.validate()
    assert found["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert found == task.validate()
    assert found["accuracy"] == pytest.approx(
        100 * (logits.argmax(-1) == tokens).float().mean().item(), rel=1e-5
    )
    assert found["loss_last"] == pytest.approx(token_losses(logits, tokens, 0)[:, 5:].mean().item(), rel=1e-5)


def test_a_step_by_hand(images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path) -> None:
    recipe = var_recipe.with_options(
        label_smoothing=0.2, weight_decay=0.3, weight_decay_end=0.1, clip=0.05, warmup=0.1, lr_end=0.2,
        pg=0.9, pg0=0,
    )  # fmt: skip
    task = make(images, tokenizer, recipe, tmp_path)
    assert task.ema is not None
    tokens, labels = next(iter(task.feed(0, torch.arange(12).view(1, 12))))
    twin, average = copy.deepcopy(task.var).train(), {k: v.clone() for k, v in task.ema.average.items()}
    task.step(Moment(302, 1001, 0, False), (tokens, labels))

    # the second of three scales joined a quarter of the way from step 100.1 to 900.9, at step 301; this is its second
    # step, and its weight rises within 1/300 of all
    weights = torch.tensor([1.0] + 4 * [2 / (1001 / 300)])
    twin.key_rows(task.device).keys = row_keys(step_seed(recipe.seed, 302), slice(0, 12))
    logits = twin(labels, task.vae.quantize.idxBl_to_var_input([tokens[:, :1], tokens[:, 1:5]]))
    logs = logits.log_softmax(-1)
    picked = logs.gather(-1, tokens[:, :5, None])[..., 0]
    losses = -(0.8 * picked + 0.2 * logs.mean(-1))  # (B, 5)
    ((losses * weights).sum(1).mean() / 21).backward()
    gradients = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert norm > 2 * recipe.clip
    shrink = recipe.clip / norm

    passed = (302 - 100) / 900  # after 100 steps of warm-up; then slowly down, as progressive training has it
    middle = (1 + 0.2 + 0.8 * (1 - 0.9)) / 2
    lr = 0.1 * 12 / 256 * (1 + (middle - 1) * passed / 0.9)
    decay = 0.1 + 0.2 * (0.5 + 0.5 * math.cos(math.pi * 302 / 1000))
    (optimizer,) = task.optimizers
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(lr) and group["betas"] == (0.9, 0.95)
        assert group["weight_decay"] == pytest.approx(decay if group["decay"] else 0)
    old = twin.state_dict()
    for name, p in task.var.named_parameters():
        if name not in gradients:
            continue
        # two orders of summation in fp32
        torch.testing.assert_close(p.grad, gradients[name] * shrink, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(task.ema.average[name], 0.9 * average[name] + 0.1 * p.detach())
    # the first step of Adam moves every weight by lr, against the sign of its gradient
    head, slope = old["head.weight"], task.var.head.weight.grad
    assert slope is not None
    moved = head * (1 - lr * decay) - lr * slope / (slope.abs() + 1e-8)
    torch.testing.assert_close(task.var.head.weight.detach(), moved)


def test_the_learning_rate_grows_with_the_images_of_a_step(
    images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    task = make(images, tokenizer, var_recipe.with_options(batch_size=512, warmup=0), tmp_path)
    (batch,) = task.feed(0, epoch_batches(0, 0, task.num_items, 512))
    task.step(Moment(0, 10, 0, False), batch)
    (optimizer,) = task.optimizers
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 36 / 256)  # all there are


def test_the_recipe_reaches_the_model(
    images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    def build(**options: float) -> VAR:
        return make(images, tokenizer, var_recipe.with_options(copies=1, **options), tmp_path).var

    plain = build(cond_drop_rate=0.3, drop_path_rate=0.25, drop_rate=0.15)
    assert plain.cond_drop_rate == plain.config["cond_drop_rate"] == 0.3
    assert plain.config["drop_path_rate"] == 0.25 and plain.config["drop_rate"] == 0.15
    assert [block.drop_path.rate for block in plain.blocks] == [0, 0.25]
    assert {m.p for m in plain.modules() if isinstance(m, torch.nn.Dropout)} == {0.15}
    for option, part in (("init_adaln", "ada_lin"), ("init_adaln_gamma", "ada_lin"), ("init_head", "head.w")):
        other = build(**{option: 2 * getattr(var_recipe, option)}).state_dict()
        ratios = {name: (other[name] / value).nan_to_num(1.0) for name, value in plain.state_dict().items()}
        changed = {name for name, ratio in ratios.items() if (ratio != 1).any()}
        assert changed and all(part in name for name in changed), option
        for name in changed:
            assert set(ratios[name].unique().tolist()) <= {1.0, 2.0}


def test_validation_takes_the_average_and_leaves_the_weights_alone(
    images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    task = make(images, tokenizer, var_recipe, tmp_path)
    (batch,) = task.feed(0, torch.arange(12).view(1, 12))
    for step in range(3):
        task.step(Moment(step, 10, 0, False), batch)
    before = {name: tensor.clone() for name, tensor in task.var.state_dict().items()}
    loss = task.validate()["loss"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.var.state_dict().items())
    task.var.load_state_dict(task.weights())
    task.ema = None
    assert task.validate()["loss"] == loss
    task.var.load_state_dict(before)
    assert task.validate()["loss"] != loss


def test_epochs_go_round_the_augmented_copies(
    images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    task = make(images, tokenizer, var_recipe, tmp_path)
    rows = torch.tensor([[4, 5, 6]])
    (first, labels), (second, _), (third, _) = (next(iter(task.feed(epoch, rows))) for epoch in range(3))
    assert torch.equal(first, third)
    assert isinstance(task.tokens, CachedTokens)
    copies = torch.tensor([0, 1, 0])  # (epoch + index) modulo 2
    assert torch.equal(first, task.tokens.rows(rows[0], copies).long())
    assert torch.equal(second, task.tokens.rows(rows[0], 1 - copies).long())
    assert torch.equal(labels, task.train_data.labels[rows[0]])


def test_without_augmentation_one_copy_is_enough(
    images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    task = make(images, tokenizer, var_recipe.with_options(augment=0), tmp_path)
    assert isinstance(task.tokens, CachedTokens) and task.tokens.copies == 1


def test_tokens_of_fresh_crops_come_with_each_epoch(
    images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    task = make(images, tokenizer, var_recipe.with_options(tokens="online"), tmp_path)
    rows = torch.arange(36).view(3, 12)
    versions = [torch.cat([tokens for tokens, _ in task.feed(epoch, rows)]) for epoch in (0, 1, 2, 2)]
    assert len(torch.stack(versions).unique(dim=0)) == 3 and torch.equal(versions[2], versions[3])
    train_var(images, tokenizer, tmp_path / "out", task.recipe.with_options(epochs=1), progress=False)
    assert [path.name[:10] for path in (tmp_path / "out").glob("tokens-*")] == ["tokens-val"]


@pytest.mark.parametrize("autocast", ["fp32", "bf16"])
def test_a_prefix_of_the_scales_trains(
    images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path, autocast: str
) -> None:
    task = make(images, tokenizer, var_recipe.with_options(pg=0.9, pg0=0, autocast=autocast), tmp_path)
    batch = next(iter(task.feed(0, torch.arange(12).view(1, 12))))
    for step, scales in ((0, 1), (50, 2), (95, 3)):
        metrics = task.step(Moment(step, 100, 0, True), batch)
        assert len(metrics["usage"]) == scales and math.isfinite(metrics["loss"])
    logits = task.forward(*batch, 2)[0].detach()
    # the head is in the precision of autocast too, as published: its numbers are held exactly by bfloat16
    assert logits.dtype == torch.float32 and torch.equal(
        logits == logits.bfloat16(), torch.full_like(logits, autocast == "bf16", dtype=torch.bool)
    )


def test_smoothing_and_usage_by_hand() -> None:
    logits = torch.zeros(1, 2, 4)
    logits[0, 0, 1] = 30.0
    targets = torch.tensor([[1, 3]])
    torch.testing.assert_close(token_losses(logits, targets, 0.0), torch.tensor([[0.0, math.log(4)]]))
    # smoothing moves 0.4 * 3/4 of the mass to codes that the sure first token gives 30 nats
    torch.testing.assert_close(token_losses(logits, targets, 0.4)[0, 0], torch.tensor(9.0))
    tally, found = (
        Tally(ScaleSchedule((1, 2)), 1, 4, torch.device("cpu")),
        torch.tensor([[0, 1, 1, 2, 3], [0, 1, 1, 1, 1]]),
    )
    tally.add(torch.zeros(2, 5), found, found)
    assert tally.summary(ALONE)["usage"] == [25.0, 75.0]


def test_another_tokenizer_does_not_take_the_checkpoint(
    trained: Path, images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    vae = load_tokenizer(tokenizer)
    with torch.no_grad():
        vae.quantize.embedding.weight[0] += 1
    other = var_ext.save_model(tmp_path / "other", vae)
    with pytest.raises(CheckpointError, match="another run: tokenizer changed"):
        train_var(images, other, trained, var_recipe, progress=False)


def test_a_missing_tokenizer_is_named(images: Path, var_recipe: VARRecipe, tmp_path: Path) -> None:
    with pytest.raises((ValueError, CheckpointError), match="nowhere"):
        train_var(images, tmp_path / "nowhere", tmp_path / "out", var_recipe, progress=False)


def test_fine_tuning_on_other_classes_and_scales(
    trained: Path,
    other_images: Path,
    var_recipe: VARRecipe,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = var_recipe.with_options(epochs=1, patch_nums="1,3,4", freeze="blocks.{0-0}.*,head.*")
    out = train_var(other_images, trained, tmp_path, recipe, init_from=trained, progress=False)
    said = [
        record.message for record in caplog.records if record.levelno >= logging.WARNING
    ]  # what users see
    assert "class embeddings are new: 3 classes instead of 2" in said
    before, after = (load_tensors(folder / "var.safetensors") for folder in (trained, out))
    kept = {name for name in before if name.startswith(("blocks.0.", "head."))}
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert not torch.equal(before["blocks.1.ffn.fc1.weight"], after["blocks.1.ffn.fc1.weight"])
    assert after["class_emb.weight"].shape[0] == 4 and after["pos_1LC"].shape[1] == 1 + 9 + 16
    sampler = var_ext.load(out)
    assert sampler.class_names == ["stripes0", "stripes1", "stripes2"]
    assert sampler.var.schedule.patch_nums == (1, 3, 4) and sampler(labels=2, seeds=0).shape == (1, 3, 8, 8)


def test_weights_to_begin_with_are_pinned(
    trained: Path, images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    recipe = var_recipe.with_options(epochs=1)
    train_var(images, trained, tmp_path, recipe, init_from=trained, progress=False)
    with pytest.raises(CheckpointError, match="weights to begin with changed"):
        train_var(images, trained, tmp_path, recipe, progress=False)
    with pytest.raises(ValueError, match="must be of a transformer with depth = 3, got 2"):
        train_var(
            images, trained, tmp_path / "b", recipe.with_options(depth=3), init_from=trained, progress=False
        )
    with pytest.raises(CheckpointError, match="holds a tokenizer alone"):
        train_var(images, trained, tmp_path / "c", recipe, init_from=tokenizer, progress=False)
