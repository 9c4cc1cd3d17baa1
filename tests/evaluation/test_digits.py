"""The report tells good samplers from bad ones, and copies from new images."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch

from tests.evaluation.conftest import ReplaySampler
from var_ext.evaluation import DigitsJudge, DigitsReport, Trial, choose_sampling, evaluate_digits
from var_ext.evaluation.choose import pick
from var_ext.evaluation.digits import draw
from var_ext.evaluation.judge import read_split
from var_ext.models import VAR, VQVAE
from var_ext.sampling import Sampler
from var_ext.training import VARRecipe


@pytest.fixture(scope="module")
def untrained(judge: DigitsJudge) -> DigitsReport:
    torch.manual_seed(0)
    vae = VQVAE(32, z_channels=8, ch=32, ch_mult=(1, 1), v_patch_nums=(1, 2, 4))
    var = VAR(vae, num_classes=10, depth=1, embed_dim=64, num_heads=1, patch_nums=(1, 2, 4))
    return evaluate_digits(Sampler(vae, var), images_per_class=20, draws=3, cfg=0.5, judge=judge)


@pytest.fixture(scope="module")
def copied(judge: DigitsJudge) -> DigitsReport:
    return evaluate_digits(ReplaySampler(judge.train), images_per_class=40, judge=judge)  # type: ignore[arg-type]


def test_an_untrained_model_fails(untrained: DigitsReport) -> None:
    assert untrained.num_samples == 200
    assert untrained.sampling == {"cfg": 0.5, "top_k": 900, "top_p": 0.96}
    assert untrained.accuracy < 0.3  # chance is 0.1
    assert untrained.real_accuracy > 0.97
    assert untrained.frechet.ratio > 3


def test_copies_of_training_images_show(copied: DigitsReport) -> None:
    assert copied.accuracy > 0.99
    assert copied.frechet.ratio < 1.5  # they are distributed as real images: only the neighbours tell
    for table in (copied.neighbours, copied.neighbours_augmented, copied.neighbours_coded):
        assert table.near == 1 and table.samples_median < table.threshold < table.real_median


def test_copies_of_augmented_images_show(judge: DigitsJudge) -> None:
    """Seen with the augmentation that made them, and with no other."""
    sampler: Any = ReplaySampler(read_split("train", 8, augment=1.0, seed=3, epoch=1))
    for seed, near in ((3, 1.0), (4, 0.3)):
        found = evaluate_digits(
            sampler, images_per_class=20, draws=2, augment=1.0, copies=2, augment_seed=seed, judge=judge
        )
        table = found.neighbours_augmented
        assert (table.near == near) if near == 1 else (table.near < near)


def test_searches_by_default_what_the_digits_recipe_trains_on() -> None:
    recipe, given = VARRecipe.digits(), inspect.signature(evaluate_digits).parameters
    assert (given["augment"].default, given["copies"].default) == (recipe.augment, recipe.copies)
    assert given["augment_seed"].default == recipe.seed


def test_new_real_images_are_no_copies(judge: DigitsJudge) -> None:
    found = evaluate_digits(ReplaySampler(judge.real), images_per_class=40, judge=judge)  # type: ignore[arg-type]
    assert found.neighbours.near < 0.03  # 1% of the split, drawn 400 times with replacement
    assert found.accuracy == pytest.approx(found.real_accuracy, abs=0.02)
    assert found.samples_spread == pytest.approx(found.real_spread, rel=0.05)


def test_noise_costs_distance(judge: DigitsJudge, copied: DigitsReport) -> None:
    noisy = ReplaySampler(judge.train, noise=0.15)
    found = evaluate_digits(noisy, images_per_class=40, judge=judge)  # type: ignore[arg-type]
    assert found.frechet.ratio > 2 * copied.frechet.ratio
    assert found.neighbours.near < 0.01


def test_equal_sizes_are_compared_with_equal_sizes(copied: DigitsReport) -> None:
    f = copied.frechet
    assert f.half_size == 200
    assert f.reconstructions < 1e-9  # the stand-in's tokenizer is perfect
    # Perfect reconstructions of one half are that half, and copies of training images are training images.
    assert f.reconstructions_half == pytest.approx(f.halves, rel=1e-6)
    assert f.samples_half == pytest.approx(f.train_half, rel=0.2)
    assert f.samples < f.samples_half  # the bias of small sets, which is why both are there
    assert f.ratio == f.samples_half / f.halves and f.plain_ratio == f.samples / f.halves


def test_report_reads_as_json_and_markdown(copied: DigitsReport) -> None:
    found = json.loads(json.dumps(copied.as_dict()))
    assert found["accuracy"] == copied.accuracy
    assert found["frechet"]["ratio"] == copied.frechet.ratio
    assert len(found["class_accuracy"]) == 10
    text = copied.as_markdown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {5}
    assert f"**{copied.frechet.ratio:.2f}**" in text
    assert "400 samples (cfg 1.5, top_k 900, top_p 0.96, seeds from 0)" in text


def test_samples_do_not_depend_on_the_batches(judge: DigitsJudge) -> None:
    sampler: Any = ReplaySampler(judge.train, noise=0.1)
    one, two = draw(sampler, 3, seed=5, batch_size=4), draw(sampler, 3, seed=5, batch_size=30)
    assert torch.equal(one.images, two.images)
    assert one.labels.tolist() == sorted(list(range(10)) * 3)
    assert not torch.equal(one.images, draw(sampler, 3, seed=6).images)


def _sampler(judge: DigitsJudge, **attributes: object) -> Any:
    sampler = ReplaySampler(judge.train)
    for name, value in attributes.items():
        setattr(sampler, name, value)
    return sampler


@pytest.mark.parametrize(
    ("attributes", "options", "message"),
    [
        ({"num_classes": 1000}, {}, "must have 10 classes to draw digits, got 1000"),
        ({"image_size": 4}, {}, "at least 8x8 pixels, got 4"),
        ({}, {"images_per_class": 19}, "images_per_class must be at least 20 for split 'test', got 19"),
        ({}, {"split": "train"}, "split"),
        ({}, {"split": "val"}, "judge must be for image size and split"),
        ({"image_size": 16}, {}, "judge must be for image size and split"),
        ({}, {"draws": 1}, "draws at least 2, got 50 and 1"),
        ({}, {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_refuses_what_it_cannot_judge(
    judge: DigitsJudge, attributes: dict[str, object], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_digits(_sampler(judge, **attributes), judge=judge, **options)


def test_refuses_images_of_another_size(judge: DigitsJudge) -> None:
    sampler = _sampler(judge)
    sampler.source = type(judge.train)(torch.rand(1197, 9, 9), judge.train.labels)
    with pytest.raises(ValueError, match=r"images of shape \(50, 3, 8, 8\), got \(50, 3, 9, 9\)"):
        evaluate_digits(sampler, judge=judge)


class GuidedSampler(ReplaySampler):
    """Noise falls with guidance up to cfg 2, and grows beyond."""

    def __call__(self, labels: Any, seeds: Any, **settings: float) -> torch.Tensor:
        self.noise = 0.1 * abs(settings["cfg"] - 2)
        return super().__call__(labels, seeds, **settings)


def test_chooses_the_best_settings_on_validation_images(judge: DigitsJudge) -> None:
    sampler: Any = GuidedSampler(judge.train)
    choice = choose_sampling(
        sampler, cfgs=(0.0, 2.0, 4.0), top_ks=(0,), top_ps=(0.9, 0.5), images_per_class=10
    )
    tried = [(trial.cfg, trial.top_p) for trial in choice.trials]
    assert tried == [(0.0, 0.9), (2.0, 0.9), (4.0, 0.9), (2.0, 0.5)]
    assert choice.best.settings == {"cfg": 2.0, "top_k": 0, "top_p": 0.9}  # the first of two equal ones
    assert choice.real_accuracy > 0.97
    assert json.loads(json.dumps(choice.as_dict()))["best"]["cfg"] == 2.0


def test_accuracy_comes_before_distance() -> None:
    close, right = (
        Trial(0.0, 0, 1.0, accuracy=0.8, frechet=1.0),
        Trial(2.0, 0, 1.0, accuracy=0.97, frechet=5.0),
    )
    assert pick([close, right], floor=0.95) is right
    assert pick([close, right], floor=0.7) is close
    assert pick([close, right], floor=0.99) is right  # none is able: the most accurate


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"cfgs": ()}, "there must be a cfg, a top_k and a top_p to try"),
        ({"images_per_class": 0}, "images_per_class must be at least 1, got 0"),
    ],
)
def test_choice_refuses_an_empty_grid(judge: DigitsJudge, grid: dict[str, Any], message: str) -> None:
    sampler: Any = ReplaySampler(judge.train)
    with pytest.raises(ValueError, match=message):
        choose_sampling(sampler, **{"cfgs": (1.0,), "top_ks": (0,), "top_ps": (0.0,), **grid})
