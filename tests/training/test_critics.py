"""Discriminators: what they see, their normalisation, one that wins, and all of it on micro-batches and resumed."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.training.vits import vit_entries, vit_file
from var_ext.models.keyed import key_rows, row_keys
from var_ext.training import TokenizerRecipe
from var_ext.training.critics import Critic, ViTDiscriminator, build_discriminator, spectral
from var_ext.training.critics.augment import DiffAugment, blurred, crop_at, cut_out, moved, recoloured
from var_ext.training.critics.watch import Watch
from var_ext.training.frozen_vit import FrozenViT
from var_ext.training.loop import Moment
from var_ext.training.ranks import ALONE
from var_ext.training.tokenizer import TokenizerTask
from var_ext.training.tokenizer_plan import plan

CPU = torch.device("cpu")


def pictures(count: int, side: int) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


# ---------------------------------------------------------------------- what is seen


def test_moving_by_hand() -> None:
    x, drawn = pictures(3, 16), torch.tensor([[0.0, 0.5], [0.999, 0.0], [0.5, 0.5]])  # by -2, 0 or 2 of 16
    found = moved(x, drawn)
    wanted = torch.zeros_like(x)
    wanted[0, :, 2:] = x[0, :, :-2]  # starts two rows before the image
    wanted[1, :, :-2, 2:] = x[1, :, 2:, :-2]
    wanted[2] = x[2]
    assert torch.equal(found, wanted)


def test_recolouring_by_hand() -> None:
    x, drawn = pictures(2, 8), torch.tensor([[0.7, 0.2, 0.9], [0.5, 0.5, 0.5]])
    one = x[0] + 0.2
    one = (one - one.mean(0)) * 0.4 + one.mean(0)
    one = (one - one.mean()) * 1.4 + one.mean()
    found = recoloured(x, drawn)
    torch.testing.assert_close(found[0], one)
    torch.testing.assert_close(found[1], x[1])  # in the middle nothing changes


@pytest.mark.parametrize("side", [10, 15])
def test_cutting_out_by_hand(side: int) -> None:
    x = torch.ones(50, 3, side, side)
    drawn = torch.rand(50, 2)
    found, size = cut_out(x, drawn, 0.2), round(0.2 * side)
    for image, (row, column) in zip(found, drawn.tolist(), strict=True):
        places = [int(u * (side + 1 - size % 2)) - size // 2 for u in (row, column)]
        wanted = torch.ones(3, side, side)
        (top, bottom), (left, right) = ((max(0, p), p + size) for p in places)
        wanted[:, top:bottom, left:right] = 0
        assert torch.equal(image, wanted) and image.min() == 0


def test_the_blur_by_hand() -> None:
    x = torch.zeros(1, 3, 32, 32)
    x[..., 16, 16] = 1
    width = 4 * 0.25  # sqrt(32 / 2), a quarter of it left
    bell = torch.tensor([2 ** -((i / width) ** 2) for i in range(-3, 4)])
    bell = bell / bell.sum()
    torch.testing.assert_close(blurred(x, 0.25)[0, 0, 13:20, 13:20], torch.outer(bell, bell))
    assert blurred(x, 0.0) is x and torch.allclose(
        blurred(torch.ones(1, 3, 8, 8), 1.0), torch.ones(1, 3, 8, 8)
    )


def test_crops_by_hand() -> None:
    x = pictures(2, 9)
    found = crop_at(x, torch.tensor([[1, 2], [5, 0]]), 4)
    assert torch.equal(found, torch.stack([x[0, :, 1:5, 2:6], x[1, :, 5:9, 0:4]]))


def test_rows_see_the_same_in_any_batch_and_views_something_else() -> None:
    x = pictures(8, 16)
    views = nn.ModuleList([DiffAugment(0.5, 0.2), DiffAugment(0.5, 0.2), DiffAugment(0.0, 0.2)])
    rows = key_rows(views, CPU)
    rows.keys = row_keys(7, slice(0, 8))
    whole, other = views[0](x), views[1](x)
    assert views[2](x) is x
    rows.keys = row_keys(7, slice(3, 6))
    assert torch.equal(views[0](x[3:6]), whole[3:6])
    same = [(a == b).all().item() for a, b in zip(whole, x, strict=True)]
    assert not all(same) and not torch.equal(whole, other)


# ---------------------------------------------------------------------- spectral norm


def test_the_largest_singular_value_becomes_one() -> None:
    torch.manual_seed(0)
    layer = spectral.normalise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(5, 7)))
    for _ in range(50):
        spectral.iterate(layer)
    for part in layer:
        weight = part.weight.flatten(1)  # type: ignore[union-attr, operator]
        assert float(torch.linalg.matrix_norm(weight.detach(), 2)) == pytest.approx(1, rel=1e-3)
    before = [b.clone() for b in layer.buffers()]
    layer[0](torch.zeros(1, 3, 5, 5))
    assert all(
        torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True)
    )  # passes iterate nothing


def test_its_gradient_is_that_of_the_quotient() -> None:
    torch.manual_seed(0)
    part = spectral.Spectral(torch.randn(4, 6))
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    part.double()
    assert torch.autograd.gradcheck(part, (weight,))


# ---------------------------------------------------------------------- heads over a ViT


def test_heads_over_a_vit() -> None:
    vit = FrozenViT(vit_entries(), 32)
    module = ViTDiscriminator(vit)
    assert module.after == [0, 1, 2, 3] and len(module.heads) == 5
    assert not any(name.startswith("frozen") for name in module.state_dict())
    x = pictures(2, 32).requires_grad_(True)
    logits = module(x)
    assert logits.shape == (2, 5 * 16)
    tokens = vit(x, [1])[1]  # after the second block
    act = (tokens[:, 1:] + tokens[:, :1]).transpose(1, 2)
    head = module.heads[2]
    h = head.first(act)
    # a kernel of nine over a ring of sixteen patches
    conv = head.second[0]
    ring = torch.cat([h[..., -4:], h, h[..., :4]], 2)
    second = head.second[2](head.second[1](nn.functional.conv1d(ring, conv.weight, conv.bias)))
    torch.testing.assert_close(logits[:, 32:48], head.last((second + h) / 2**0.5)[:, 0])
    logits.sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0 and all(p.grad is None for p in vit.parameters())


def test_larger_images_are_seen_whole_or_in_part() -> None:
    module = ViTDiscriminator(FrozenViT(vit_entries(), 32))
    x = pictures(16, 48)
    whole = nn.functional.interpolate(x, (32, 32), mode="area")
    assert torch.equal(module.fitted(x), whole)  # without keys nothing is drawn
    rows = key_rows(module, CPU)
    rows.keys = row_keys(1, slice(0, 16))
    found = module.fitted(torch.cat([x, x]))
    assert torch.equal(found[:16], found[16:])  # both views of a row alike
    parts = [not torch.equal(a, b) for a, b in zip(found, whole, strict=False)]
    assert 2 < sum(parts) < 14
    patches = x.unfold(2, 32, 1).unfold(3, 32, 1)  # (16, 3, 17, 17, 32, 32)
    i = parts.index(True)
    assert (patches[i] == found[i][:, None, None]).all(-1).all(-1).all(0).any()


# ---------------------------------------------------------------------- in training


def critic_of(recipe: TokenizerRecipe) -> Critic:
    torch.manual_seed(0)
    return Critic(build_discriminator(recipe, CPU), recipe, ALONE, CPU)


def test_its_schedule_begins_with_itself(tokenizer_recipe: TokenizerRecipe) -> None:
    recipe = dataclasses.replace(
        tokenizer_recipe, weight_adversarial=0.4, adversarial_start=0.2, adversarial_warmup=0.02, critic_lr=1e-3,
        critic_warmup=0.02, critic_blur=0.04, lr_end=0.3,
    )  # fmt: skip
    critic = critic_of(recipe)
    rates = [critic.rate(step, 1000) for step in (200, 210, 220, 999)]
    # 20 steps of warm-up from step 200, the end is that of the run
    assert rates == pytest.approx([0.005e-3, (0.005 + 0.995 / 2) * 1e-3, 1e-3, 0.3e-3])
    assert [critic.weight(p) for p in (0.1, 0.21, 0.22)] == pytest.approx([0, 0.5, 1])
    assert [critic.blur(p) for p in (0.1, 0.2, 0.22, 0.24, 0.9)] == pytest.approx([1, 1, 0.5, 0, 0])


@pytest.fixture
def full(tokenizer_recipe: TokenizerRecipe) -> TokenizerRecipe:
    """All that a critic can have."""
    return dataclasses.replace(
        tokenizer_recipe, weight_adversarial=0.4, adversarial_start=0.0, adversarial_warmup=0.5, critic_blur=1.0,
        critic_augment=0.7, bcr=4.0, lecam=0.3, ch=64, dropout=0.1, weight_perceptual=1.0, perceptual="structural",
        restart_every=0,
    )  # fmt: skip


def test_its_loss_by_hand(full: TokenizerRecipe) -> None:
    critic = critic_of(full)
    critic.averages = (0.4, -0.3)
    real, fake = pictures(3, 8), pictures(3, 8).flip(0) * 0.5
    critic.key(5, slice(0, 3))
    loss, values = critic.losses(critic.module, real, fake, 0.3)
    seen = {
        "real": critic.views["real"](blurred(real, 0.3)), "fake": critic.views["fake"](blurred(fake, 0.3)),
        "real again": critic.views["real again"](real), "fake again": critic.views["fake again"](fake),
    }  # fmt: skip
    r, f, r2, f2 = (critic.module(x) for x in seen.values())
    hinge = (1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean()
    bcr = (r - r2).square().mean() + (f - f2).square().mean()
    lecam = (r + 0.3).clamp(min=0).square().mean() + (0.4 - f).clamp(min=0).square().mean()
    torch.testing.assert_close(loss, hinge + 4 * bcr + 0.3 * lecam)
    torch.testing.assert_close(values["critic"], hinge)
    torch.testing.assert_close(critic.opinion(fake, 5, slice(0, 3), 0.7), -critic.module(
        critic.views["decoder"](blurred(fake, 0.3))).mean())  # fmt: skip
    assert all(p.requires_grad for p in critic.module.parameters())
    assert not torch.equal(seen["real"], seen["real again"])


def test_micro_batches_see_and_learn_the_same(images: Path, full: TokenizerRecipe) -> None:
    """With every loss on: the critic, the pass ahead for the adaptive weight, consistency, LeCAM, blur."""
    states, logged = [], []
    for micro in (0, 5):
        task = TokenizerTask(images, dataclasses.replace(full, micro_batch=micro))
        batch = task.train_data.batch(range(12))
        for step in range(2, 5):
            metrics = task.step(Moment(step, 10, 0, True), batch)
        assert task.critic is not None
        states.append({**task.vae.state_dict(), **task.critic.module.state_dict()})
        logged.append({name: value for name, value in metrics.items() if name != "usage"})
    assert {"critic", "bcr", "lecam", "adversarial", "weight_adversarial", "perceptual"} <= logged[0].keys()
    # three steps of Adam turn the rounding of sums into small steps
    for name, value in logged[0].items():
        assert logged[1][name] == pytest.approx(value, rel=2e-3, abs=1e-4), name
    flat = [torch.cat([t.double().flatten() for t in state.values()]) for state in states]
    assert float((flat[0] - flat[1]).norm() / flat[0].norm()) < 1e-5


def test_a_resumed_critic_goes_on_bit_for_bit(images: Path, full: TokenizerRecipe) -> None:
    tasks = [TokenizerTask(images, full) for _ in range(2)]
    batch = tasks[0].train_data.batch(range(12))
    for step in range(2, 4):
        tasks[0].step(Moment(step, 10, 0, False), batch)
    tasks[1].load_state_dict(copy.deepcopy(tasks[0].state_dict()))
    for task in tasks:
        assert task.critic is not None and task.critic.averages is not None
        task.step(Moment(4, 10, 0, False), batch)
    for one, two in zip(
        *(task.critic.module.state_dict().values() for task in tasks if task.critic), strict=True
    ):
        assert torch.equal(one, two)
    assert tasks[0].critic and tasks[1].critic and tasks[0].critic.averages == tasks[1].critic.averages


def test_a_vit_as_critic_is_pinned_and_learns(images: Path, full: TokenizerRecipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(full, discriminator=str(vit_file(tmp_path)), discriminator_size=32)
    task = TokenizerTask(images, recipe)
    assert task.critic is not None and task.pins["discriminator"] == "vit-64/8 heads"
    assert (
        "weights of the discriminator" in task.pins["digests"] and "discriminator" not in task.pins["recipe"]
    )
    before = [p.detach().clone() for p in task.critic.module.parameters()]
    metrics = task.step(Moment(3, 10, 0, True), task.train_data.batch(range(12)))
    assert metrics["critic"] > 0 and metrics["weight_adversarial"] > 0
    assert all(not torch.equal(a, b) for a, b in zip(before, task.critic.module.parameters(), strict=True))


def vit_options(folder: Path) -> dict[str, object]:
    return {"discriminator": str(vit_file(folder)), "discriminator_size": 32}


@pytest.mark.parametrize("micro", [0, 5])
def test_activation_checkpointing_of_a_vit_changes_nothing(
    images: Path, full: TokenizerRecipe, tmp_path: Path, micro: int
) -> None:
    recipe = dataclasses.replace(full, **vit_options(tmp_path), micro_batch=micro)
    ends, runs = [], []
    for again in (False, True):
        task = TokenizerTask(images, dataclasses.replace(recipe, activation_checkpointing=again))
        assert task.critic is not None and task.critic.vit is not None
        block, calls = task.critic.vit.blocks[0], list[int]()
        block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        for step in range(2, 4):
            task.step(Moment(step, 10, 0, True), task.train_data.batch(range(12)))
        ends.append({**task.vae.state_dict(), **task.critic.module.state_dict()})
        runs.append(len(calls))
    assert runs[1] > runs[0]  # run again for gradients
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_a_dry_run_plays_activation_checkpointing_of_a_vit(full: TokenizerRecipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(full, **vit_options(tmp_path), batch_size=1, ch=32, bcr=0.0)
    assert plan(dataclasses.replace(recipe, activation_checkpointing=True)).activations > 0


# ---------------------------------------------------------------------- one that wins


def test_one_that_wins_is_told_and_waits(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(0.1)
    losses = [0.05] * 4 + [0.2] + [0.05] * 5
    for step, loss in enumerate(losses):
        assert not watch.held
        watch.update(loss, step, 500, tell=True)  # 1% are 5 steps
    assert watch.held and not caplog.records[0].levelno < logging.WARNING
    assert "step 9: the discriminator has won" in caplog.text and "--critic-lr" in caplog.text
    again = Watch(0.1)
    again.load_state_dict(watch.state_dict())
    for loss, held in ((0.05, True), (0.39, True), (0.41, False), (0.05, False)):
        again.update(loss, 10, 500, tell=False)
        assert again.held == held


def test_a_held_critic_stays_as_it_is_until_its_loss_rises(images: Path, full: TokenizerRecipe) -> None:
    task = TokenizerTask(images, dataclasses.replace(full, critic_throttle=10.0))  # any loss is below
    assert task.critic is not None
    batch = task.train_data.batch(range(12))
    for step in range(2, 5):
        assert task.step(Moment(step, 10, 0, True), batch)["critic_held"] == 0
    before = [t.clone() for t in task.critic.module.state_dict().values()]
    metrics = task.step(Moment(5, 10, 0, True), batch)
    assert metrics["critic_held"] == 1 and metrics["critic"] > 0 and metrics["adversarial"] != 0
    assert all(
        torch.equal(a, b) for a, b in zip(before, task.critic.module.state_dict().values(), strict=True)
    )
    task.critic.watch.least = 1e-3
    task.step(Moment(6, 10, 0, True), batch)  # sees that its loss is high
    assert task.step(Moment(7, 10, 0, True), batch)["critic_held"] == 0
    assert not all(
        torch.equal(a, b) for a, b in zip(before, task.critic.module.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptive_clamp": "0.1"}, "adaptive_clamp must be least,most such as 0.015,10000, got 0.1"),
        ({"adaptive_clamp": "2,1"}, "adaptive_clamp must be least,most"),
        ({"critic_lr": 0}, r"critic_lr must be in \(0, inf\), got 0.0"),
        ({"critic_augment": 1.5}, r"critic_augment must be in \[0, 1\], got 1.5"),
        ({"bcr": -1}, "bcr must be at least 0, got -1.0"),
        ({"perceptual": "vgg"}, "perceptual must be 'lpips' or 'structural', got 'vgg'"),
        ({"l1_start": 2}, r"l1_start must be in \[0, 1\], got 2.0"),
    ],
)
def test_bad_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerRecipe().with_options(**options)
