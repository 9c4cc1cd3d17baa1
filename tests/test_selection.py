"""Rejection sampling: the best of each label, the same bit for bit in any batch; bad input is refused."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models.conftest import small_pair
from var_ext import Sampler
from var_ext.selection import Keeper, Kept, count_candidates, count_kept

LABELS = torch.arange(60) % 5
SEEDS = 1000 + 17 * torch.arange(60)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(*small_pair(), defaults={"cfg": 2.0, "top_k": 12, "top_p": 0.9}, precision="fp32")


def redness(images: Tensor, labels: Tensor) -> Tensor:
    return images[:, 0].flatten(1).double().mean(1)


def by_hand(sampler: Sampler, keep: int) -> list[tuple[int, int, float]]:
    """Label, seed and score of the kept: images drawn one by one, sorted."""
    found = []
    for label in range(5):
        rows = []
        for seed in SEEDS[label == LABELS].tolist():
            (value,) = redness(sampler(label, seed), torch.tensor([label])).tolist()
            rows.append((-value, seed))
        found += [(label, seed, -value) for value, seed in sorted(rows)[:keep]]
    return found


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_the_best_of_each_label_whatever_the_batch(sampler: Sampler, batch: int) -> None:
    best = sampler.best_of(LABELS, SEEDS, redness, 0.25, batch_size=batch)
    assert best.images.shape == (15, 3, 8, 8) and best.scores.dtype == torch.float64
    found = list(zip(best.labels.tolist(), best.seeds.tolist(), best.scores.tolist(), strict=True))
    assert found == by_hand(sampler, 3)
    assert torch.equal(best.images, sampler(best.labels, best.seeds))
    assert (best.candidates, best.share) == (60, 0.25)
    whole = redness(sampler(LABELS, SEEDS), LABELS)
    assert (
        best.mean == math.fsum(best.scores.tolist()) / 15 > best.mean_of_all == math.fsum(whole.tolist()) / 60
    )


def test_the_order_of_the_candidates_decides_that_of_labels_alone(sampler: Sampler) -> None:
    best = sampler.best_of(LABELS, SEEDS, redness, 2)
    back = sampler.best_of(LABELS.flip(0), SEEDS.flip(0), redness, 2)
    assert back.labels.tolist() == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    assert torch.equal(back.seeds.reshape(5, 2), best.seeds.reshape(5, 2).flip(0))


def test_one_label_for_all_seeds_and_numbers_of_numpy(sampler: Sampler) -> None:
    best = sampler.best_of(3, range(10), lambda images, labels: redness(images, labels).numpy(), np.int64(2))
    assert best.labels.tolist() == [3, 3] and best.share == 0.2
    assert len(sampler.best_of(3, range(10), redness, 1).seeds) == 1  # one image
    assert len(sampler.best_of(3, range(10), redness, 1.0).seeds) == 10  # all


def test_equal_scores_keep_the_lower_seeds(sampler: Sampler) -> None:
    for order in (range(9), reversed(range(9))):
        best = sampler.best_of(
            1, list(order), lambda images, labels: torch.zeros(len(labels)), 3, batch_size=2
        )
        assert best.seeds.tolist() == [0, 1, 2]


def test_without_candidates_nothing_is_kept(sampler: Sampler) -> None:
    best = sampler.best_of([], [], redness)
    assert best.images.shape == (0, 3, 8, 8) and math.isnan(best.share) and math.isnan(best.mean)


def test_memory_holds_what_is_kept_and_a_batch(sampler: Sampler) -> None:
    """An image that is kept does not keep the batch that it was part of."""
    batches: list[weakref.ref[Tensor]] = []

    def score(images: Tensor, labels: Tensor) -> Tensor:
        batches.append(weakref.ref(images))
        gc.collect()
        assert sum(batch() is not None for batch in batches) <= 2  # this one, and the last
        return torch.rand(len(labels))

    sampler.best_of(2, range(24), score, 8, batch_size=2)
    assert len(batches) == 12


def test_a_score_is_called_with_images_and_labels_and_leaves_no_graph(sampler: Sampler) -> None:
    weight, seen = torch.ones(1, requires_grad=True), []

    def score(images: Tensor, labels: Tensor) -> Tensor:
        assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
        assert labels.dtype == torch.int64 and not images.is_inference()
        found = (images * weight).flatten(1).sum(1)
        assert not found.requires_grad
        seen.extend(labels.tolist())
        return found

    sampler.best_of(LABELS, SEEDS, score, 1, batch_size=8)
    assert seen == LABELS.tolist()


def test_a_score_of_tokens_gets_them(sampler: Sampler) -> None:
    class First:
        reads_tokens = True

        def __call__(self, tokens: Tensor, labels: Tensor) -> Tensor:
            return tokens[:, 0]

    best = sampler.best_of(LABELS, SEEDS, First(), 1, batch_size=8)
    first = sampler.tokens(LABELS, SEEDS)[:, 0]
    assert best.scores.tolist() == [int(first[label == LABELS].max()) for label in range(5)]
    for options in ({"more_smooth": True}, {"conditions": {"style": torch.zeros(60)}}):
        with pytest.raises(ValueError, match="a score of tokens knows them and the label alone, got "):
            sampler.best_of(LABELS, SEEDS, First(), 1, **options)


@pytest.mark.parametrize(
    ("share", "candidates", "kept"),
    [(0.29, 100, 29), (0.05, 20, 1), (0.3, 11, 3), (1.0, 7, 7), (1e-3, 1000, 1)],
)
def test_a_share_is_what_is_written(share: float, candidates: int, kept: int) -> None:
    assert count_kept(share, candidates, 0) == kept
    assert count_kept(share, count_candidates(share, kept), 0) == kept


def test_candidates_suffice_for_any_share() -> None:
    for share in (0.05, 0.07, 0.3, 0.95, 0.999, 1.0):
        for kept in range(1, 60):
            candidates = count_candidates(share, kept)
            assert count_kept(share, candidates, 0) == kept
            assert kept == 1 or count_kept(share, candidates - 1, 0) < kept


def test_a_keeper_asks_for_items_that_it_keeps() -> None:
    keeper: Keeper[int] = Keeper([1] * 6, range(6), 2)
    asked = []

    for seed, score in enumerate([5.0, 4.0, 3.0, 4.0, 6.0, 1.0]):
        keeper.offer(1, seed, score, lambda seed=seed: asked.append(seed) or seed)  # type: ignore[misc]
    assert asked == [0, 1, 4]
    assert list(keeper.kept()) == [Kept(1, 4, 6.0, 4), Kept(1, 0, 5.0, 0)]


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        (0.0, ValueError, r"keep must be a share \(a float in \(0, 1\]\) or a number .* got 0.0"),
        (1.5, ValueError, "got 1.5"),
        (math.nan, ValueError, "got nan"),
        (0, ValueError, "got 0"),
        (-3, ValueError, "got -3"),
        (True, TypeError, "got True"),
        ("all", TypeError, "got 'all'"),
        (13, ValueError, "keep must be at most the candidates of a label, got 13 of 12 of 0"),
        (
            0.05,
            ValueError,
            "keep 0.05 of the 12 candidates of label 0 is less than one image: give at least 20",
        ),
    ],
)
def test_bad_keeps_are_refused_before_the_work(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch, keep: Any, error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(sampler.engine, "draw", lambda call: pytest.fail("drew"))
    with pytest.raises(error, match=message):
        sampler.best_of(LABELS, SEEDS, redness, keep)


def test_an_image_is_no_candidate_twice(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match="got label 3 with seed 7 twice"):
        sampler.best_of([3, 2, 3], [7, 7, 7], redness, 1)


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        (
            lambda images, labels: images[:, :1, 0, 0],
            ValueError,
            r"each of 4 images, \(4,\), got shape \(4, 1\)",
        ),
        (lambda images, labels: images.mean(), ValueError, r"got shape \(\)"),
        (lambda images, labels: None, TypeError, "each of 4 images, got NoneType"),
        (lambda images, labels: ["a"] * 4, TypeError, "got list"),
        (
            lambda images, labels: torch.tensor([0, 1, math.nan, 2]),
            ValueError,
            "finite numbers, got nan for label 2 and seed 1034",
        ),
        (lambda images, labels: torch.full((4,), math.inf), ValueError, "got inf for label 0 and seed 1000"),
    ],
)
def test_bad_scores_are_refused(sampler: Sampler, score: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sampler.best_of(LABELS, SEEDS, score, 1, batch_size=4)
