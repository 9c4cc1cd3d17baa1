"""The model in the wheel: loads, draws its digits, and each image is its own whatever the batch."""

from __future__ import annotations

import pytest
import torch

import var_ext
import var_ext.data
from tests.threads import threads
from var_ext import backend
from var_ext.checkpoints import bundled_models
from var_ext.evaluation import DigitsJudge
from var_ext.evaluation.digits import compare_frechet, compare_neighbours, draw

LABELS = torch.arange(64) % 10
SEEDS = 31 * torch.arange(64)


@pytest.fixture(scope="module")
def sampler() -> var_ext.Sampler:
    return var_ext.load("digits")


@pytest.fixture(scope="module")
def tokens(sampler) -> torch.Tensor:
    return sampler.tokens(LABELS, SEEDS)


def test_every_bundled_model_loads_and_has_a_card():
    assert "digits" in bundled_models()
    for name, folder in bundled_models().items():
        assert (folder / "README.md").read_text().startswith(f"# {name}")
        sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
        assert len(sizes) == 2 and sum(sizes) < 8_000_000


@pytest.mark.parametrize(
    ("batch", "count"),
    [(1, 1), (7, 1), (7, 2), (64, 1), (64, 2), pytest.param(1, 2, marks=pytest.mark.slow)],
)
def test_an_image_is_its_own_whatever_the_batch(sampler, tokens, batch, count):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(batch))
    with threads(count):
        drawn = sampler.tokens(LABELS[order], SEEDS[order], batch_size=batch)
    assert torch.equal(drawn, tokens[order])


def test_both_backends_draw_the_same_digits():
    exact = var_ext.load("digits", precision="fp32")  # in bf16 a draw may fall on a rounding error
    tokens = exact.tokens(LABELS, SEEDS)
    with backend.force("reference"):
        assert torch.equal(exact.tokens(LABELS, SEEDS), tokens)


def test_quality_is_what_was_promised(sampler):
    """The figures of `evaluate_digits` that need no reconstructions, which would take most of its time."""
    judge = DigitsJudge(sampler.image_size)
    samples = draw(sampler, 40, seed=0)
    accuracy = judge.accuracy(samples)
    assert accuracy >= 0.95
    assert accuracy >= judge.real_accuracy - 0.04
    stream = torch.Generator().manual_seed(0)
    assert compare_frechet(judge, samples, coded=judge.real, draws=20, generator=stream).ratio <= 3
    nearest = [judge.nearest(items, judge.train, exact=False) for items in (samples, judge.real)]
    assert compare_neighbours(*nearest).near <= 0.05  # by definition 0.01 for real images


def test_images_are_digits_of_their_class(sampler):
    """Nearest class mean of real digits: a poor judge, but it knows noise from digits."""
    data = var_ext.data.load_dataset("digits", "train", sampler.image_size)
    images, labels = data.batch(torch.arange(len(data)))
    means = torch.stack([images[labels == c].mean(0) for c in range(10)])  # (10, 3, 32, 32)
    drawn = sampler(LABELS, SEEDS) * 2 - 1
    nearest = torch.cdist(drawn.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == LABELS).float().mean() > 0.8  # real test images: 0.9
