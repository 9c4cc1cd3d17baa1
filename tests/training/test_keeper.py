"""The codebook's remedies in a training: they heal, they see the same on any ranks, and a run goes on with them."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.ranked import ranked
from tests.training.test_ranks import CLOSE, distance, weights
from var_ext.models import VQVAE
from var_ext.models.keyed import row_keys
from var_ext.models.remedies import kept_scales
from var_ext.training import TokenizerRecipe, codebook, train_tokenizer
from var_ext.training.keeper import remedies_of
from var_ext.training.loop import Moment, step_seed
from var_ext.training.ranks import ALONE
from var_ext.training.tokenizer import TokenizerTask

ALL: dict[str, Any] = {
    "scale_dropout": 0.4,
    "scale_dropout_start": 1,
    "gradient": "rotation",
    "anchors": True,
    "centre": 0.3,
    "weight_entropy": 0.1,
    "entropy_temperature": 1.0,
    "perturb_rows": 0.5,
    "perturb_tokens": 0.8,
    "perturb_codes": 6,
}


@pytest.fixture
def task(images: Path, tokenizer_recipe: TokenizerRecipe) -> TokenizerTask:
    return TokenizerTask(images, tokenizer_recipe.with_options(**ALL))


def trained(task: TokenizerTask, steps: int = 1) -> dict[str, Tensor]:
    for step in range(steps):
        torch.manual_seed(step)  # as the loop does
        task.step(Moment(step, 10, 0, True), task.train_data.batch(range(12)))
    return {name: tensor.clone() for name, tensor in task.vae.state_dict().items()}


@pytest.mark.parametrize(
    "options",
    [
        ALL,
        {"anchors": True},
        {"weight_entropy": 0.1, "entropy_temperature": 1.0},
        {"scale_dropout": 0.5},
        {"centre": 0.5},
    ],
)
def test_micro_batches_see_what_the_whole_batch_sees(
    images: Path, tokenizer_recipe: TokenizerRecipe, options: dict[str, Any]
) -> None:
    # with 64 channels a bias before a norm of two channels a group has a gradient
    recipe = tokenizer_recipe.with_options(
        **options, ch=64, dropout=0.1, weight_adversarial=0.4, adversarial_start=0.0
    )
    found = [trained(TokenizerTask(images, recipe.with_options(micro_batch=n)), 3) for n in (0, 6, 5)]
    for other in found[1:]:
        assert distance(found[0], other) < CLOSE
    assert distance(found[0], trained(TokenizerTask(images, recipe.with_options(seed=1)), 3)) > 0.01


def test_ranks_see_the_same(images: Path, tokenizer_recipe: TokenizerRecipe, tmp_path: Path) -> None:
    recipe = tokenizer_recipe.with_options(**ALL, ch=64, dropout=0.1, epochs=2, checkpoint_every=20)
    alone = train_tokenizer(images, tmp_path / "1", recipe, progress=False)
    cases: list[Any] = [
        ("tokenizer", (images, tmp_path / "2a"), recipe.with_options(micro_batch=4)),
        ("tokenizer", (images, tmp_path / "2b"), recipe.with_options(shard="optimizer")),
        ("tokenizer", (images, tmp_path / "2c"), recipe.with_options(shard="optimizer")),
    ]
    ranked(2, cases, tmp_path)
    for name in ("2a", "2b"):
        assert distance(weights(alone), weights(tmp_path / name)) < CLOSE
    one, two = weights(tmp_path / "2b"), weights(tmp_path / "2c")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_goes_on_bit_for_bit(
    images: Path, tokenizer_recipe: TokenizerRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tokenizer_recipe.with_options(**ALL, epochs=3, checkpoint_every=4)
    whole = weights(train_tokenizer(images, tmp_path / "whole", recipe, progress=False))
    step = TokenizerTask.step

    def ends(self: TokenizerTask, at: Moment, batch: Any) -> Any:
        if at.step == 6:
            raise KeyboardInterrupt
        return step(self, at, batch)

    monkeypatch.setattr(TokenizerTask, "step", ends)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(images, tmp_path / "cut", recipe, progress=False)
    monkeypatch.setattr(TokenizerTask, "step", step)
    cut = weights(train_tokenizer(images, tmp_path / "cut", recipe, progress=False))
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_losses_divide_by_the_rows_of_the_whole_step(task: TokenizerTask) -> None:
    seed = step_seed(0, 5)
    parts = ALONE.parts(12, 4)
    task.keeper.begin(seed, 0.5, 12, parts, [torch.zeros(4, 3, 8, 8)] * 3)
    assert task.keeper.remedies is not None and task.keeper.remedies.shares is not None
    draws = task.vae.quantize.draws
    assert draws is not None
    counts = torch.zeros(3)
    for part in parts:
        kept = kept_scales(draws.of(row_keys(seed, part.rows)).uniform(2), 3, 0.4, 1)
        counts += (torch.arange(3)[:, None] < kept).sum(1)
    assert torch.equal(task.keeper.remedies.shares, counts / 12) and counts[2] < 12


def test_perturbation_weakens(task: TokenizerTask) -> None:
    found = [task.keeper.strength(progress) for progress in (0.0, 0.2, 0.4, 0.6, 0.9)]
    assert found == pytest.approx([1, 1, 0.75, 0.5, 0.5])


def test_nothing_wanted_is_the_published_pass(tokenizer_recipe: TokenizerRecipe) -> None:
    assert remedies_of(tokenizer_recipe) is None
    for name, value in ALL.items():
        alone = dataclasses.replace(tokenizer_recipe, **{name: value})
        switches = name in (
            "scale_dropout",
            "gradient",
            "anchors",
            "centre",
            "weight_entropy",
            "perturb_rows",
        )
        assert (remedies_of(alone) is not None) == switches, name


def test_an_unused_code_moves_to_an_anchor_by_the_formula(task: TokenizerTask) -> None:
    vae = task.vae
    weight, hits = vae.quantize.embedding.weight, vae.quantize.ema_vocab_hit_SV
    hits.fill_(1.0)[:, 3] = 0.0
    hits[:, 5] = 0.002  # 0.2% of uniform use
    pool = torch.randn(200, 4)
    moved, blend, anchors = codebook.anchors(vae, pool)
    assert moved.tolist() == [3, 5]
    for code, a in zip(moved, blend, strict=True):
        share = hits[:, code].sum() / hits.sum()
        assert float(a) == pytest.approx(math.exp(-16 * float(share) * 10 / 0.01 - 1e-3), rel=1e-4)
    assert 0.99 < blend[0] < 1 and 0.05 < blend[1] < 0.3
    assert torch.cdist(anchors, pool).amin(1).max() < 1e-6

    trained(task)
    assert task.keeper.remedies is not None and task.ema is not None
    hits.fill_(1.0)[:, 3] = 0.0
    before, average = weight.detach().clone(), task.ema.average["quantize.embedding.weight"].clone()
    moments = {name: value.clone() for name, value in task.optimizer.state[weight].items()}
    pool = torch.full((12, 7, 4), 9.0)
    task.keeper.remedies.pool = [pool[:5], pool[5:]]
    metrics = task.keeper.finish(12, task.optimizer, task.ema)
    a = math.exp(-1e-3)
    assert float(metrics["anchored"]) == pytest.approx(a)
    for tensor, was in ((weight, before), (task.ema.average["quantize.embedding.weight"], average)):
        torch.testing.assert_close(tensor[3], was[3] * (1 - a) + 9 * a)
        was[3] = tensor[3].detach()
        assert torch.equal(tensor, was)
    state = task.optimizer.state[weight]
    torch.testing.assert_close(state["exp_avg_sq"][3], moments["exp_avg_sq"][3] * (1 - a))
    assert torch.equal(state["exp_avg"][4], moments["exp_avg"][4])
    assert task.keeper.remedies.pool == []


def test_anchors_are_drawn_by_affinity() -> None:
    torch.manual_seed(0)
    vae = VQVAE(vocab_size=2000, z_channels=4, ch=32, ch_mult=(1, 1), v_patch_nums=(1, 2), test_mode=False)
    with torch.no_grad():
        vae.quantize.embedding.weight.zero_()
    pool = torch.tensor([[0.1, 0, 0, 0], [1.0, 0, 0, 0], [4.0, 0, 0, 0]])
    anchors = codebook.anchors(vae, pool)[2]
    chances = torch.exp(-pool[:, 0].square())
    found = torch.stack([(anchors[:, 0] == x).float().mean() for x in pool[:, 0]])
    # 2000 draws: four standard deviations of a share are 0.045
    torch.testing.assert_close(found, chances / chances.sum(), rtol=0, atol=0.045)
    vae.quantize.using_znorm = True
    with torch.no_grad():
        vae.quantize.embedding.weight[:] = torch.tensor([1.0, 0, 0, 0])
    pool = torch.tensor([[5.0, 0, 0, 0], [-0.1, 0, 0, 0]])
    ahead = (codebook.anchors(vae, pool)[2][:, 0] > 0).float().mean()
    assert float(ahead) == pytest.approx(1 / (1 + math.exp(-2)), abs=0.03)


def test_anchors_heal_a_collapse(images: Path, tokenizer_recipe: TokenizerRecipe) -> None:
    """Codes far from all features but one, which takes every token; nothing else moves the others."""

    def used(**options: Any) -> list[int]:
        recipe = tokenizer_recipe.with_options(codebook_init=0, restart_every=0, ema=0, **options)
        task = TokenizerTask(images, recipe)
        with torch.no_grad():
            weight = task.vae.quantize.embedding.weight
            weight.copy_(100 + torch.arange(16.0)[:, None])
            weight[0] = 0
        trained(task, 4)
        tokens = task.vae.eval().img_to_idxBl(task.train_data.batch(range(36))[0])
        return [len(each.unique()) for each in tokens]

    assert used() == [1, 1, 1]
    healed = used(anchors=True)
    assert healed[0] >= 2 and healed[2] >= 8, healed


def test_centred_features_use_more_codes_at_1x1(images: Path, tokenizer_recipe: TokenizerRecipe) -> None:
    """Features that have a vector in common, three times as long as what tells them apart: as trained ones do."""

    def used(centre: float) -> tuple[int, float]:
        recipe = tokenizer_recipe.with_options(
            using_znorm=True, restart_every=0, ema=0, vocab_size=64, lr=1e-4, centre=centre
        )
        task = TokenizerTask(images, recipe)
        x = task.train_data.batch(range(36))[0]
        with torch.no_grad():
            spread = task.vae.features(x).float().std((0, 2, 3)).norm()
            task.vae.quant_conv.bias.fill_(3 * float(spread) / task.vae.Cvae**0.5)
        task.start()
        trained(task, 4)
        with torch.no_grad():
            mean = task.vae.eval().features(x).float().mean((0, 2, 3)).norm() / spread
        return len(task.vae.img_to_idxBl(x)[0].unique()), float(mean)

    (codes, mean), (more, near_zero) = used(0.0), used(0.3)
    assert mean > 1 and near_zero < 0.3 and more >= 2 * codes, (codes, mean, more, near_zero)


def test_centre_goes_to_zero_step_by_step_where_no_codes_are_seeded(
    images: Path, tokenizer_recipe: TokenizerRecipe
) -> None:
    recipe = tokenizer_recipe.with_options(codebook_init=0, restart_every=0, ema=0, lr=1e-9, centre=0.5)
    task = TokenizerTask(images, recipe)
    with torch.no_grad():
        task.vae.quant_conv.bias.fill_(1)
    found = []
    for step in range(4):
        metrics = task.step(Moment(step, 10, 0, True), task.train_data.batch(range(36)))
        found.append(metrics["off_centre"])
    # the rate is as good as zero, and all steps see the same images
    assert [later / former for former, later in pairwise(found)] == pytest.approx([0.5] * 3, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"centre": 1.5}, r"centre must be in \[0, 1\], got 1.5"),
        ({"scale_dropout": 1.0}, r"scale_dropout must be in \[0, 1\), got 1.0"),
        ({"scale_dropout": 0.1, "scale_dropout_start": 4}, "must be at most 3, the scales of patch_nums, got 4"),
        ({"scale_dropout_start": 0}, "scale_dropout_start must be at least 1, got 0"),
        ({"gradient": "gumbel"}, "gradient must be 'straight_through' or 'rotation', got 'gumbel'"),
        ({"weight_entropy": -1}, "weight_entropy must be at least 0"),
        ({"entropy_temperature": 0}, r"entropy_temperature must be in \(0, inf\), got 0"),
        ({"perturb_rows": 1.5}, r"perturb_rows must be in \[0, 1\]"),
        ({"perturb_codes": 0}, "perturb_codes must be at least 1"),
        ({"perturb_start": 0.8}, "perturb_stop must be at least perturb_start = 0.8, got 0.6"),
    ],
)  # fmt: skip
def test_bad_settings(tokenizer_recipe: TokenizerRecipe, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_recipe.with_options(**options)
