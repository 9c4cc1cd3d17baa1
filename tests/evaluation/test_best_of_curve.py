"""The curve: shares keep as many images of the same drawing, the best; figures are those of the judge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.evaluation.conftest import ReplaySampler
from var_ext.evaluation import BestOfCurve, DigitsJudge, JudgeMargin, best_of_curve
from var_ext.evaluation.judge import Labelled
from var_ext.selection import scores_of


class Mixed(ReplaySampler):
    """Half of its images are of another class."""

    def one(self, label: int, seed: int) -> Tensor:
        return super().one((label + 5 * (seed % 2)) % 10, seed)

    def scored(
        self, labels: Tensor, seeds: Tensor, score: Any, **settings: Any
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        for start in range(0, len(labels), 7):
            rows = slice(start, start + 7)
            images = self(labels[rows].tolist(), seeds[rows].tolist())
            yield start, images, scores_of(score, images, labels[rows], seeds[rows])


@pytest.fixture(scope="module")
def curve(judge: DigitsJudge) -> BestOfCurve:
    sampler: Any = Mixed(judge.train)
    return best_of_curve(
        sampler, JudgeMargin(judge), shares=(1.0, 0.5, 0.25), images_per_class=20, judge=judge
    )


def test_fewer_kept_are_better(curve: BestOfCurve) -> None:
    all_of_them, half, quarter = curve.rows
    assert [row.candidates for row in curve.rows] == [20, 40, 80]
    assert [row.keep for row in curve.rows] == [1.0, 0.5, 0.25]
    assert all_of_them.accuracy == pytest.approx(0.5, abs=0.02)
    assert half.accuracy > 0.97 and quarter.accuracy > 0.97  # the judge reads 99% of real digits
    assert all_of_them.score < half.score < quarter.score
    assert all_of_them.spread > quarter.spread


def test_a_share_of_one_keeps_all(curve: BestOfCurve, judge: DigitsJudge) -> None:
    sampler = Mixed(judge.train)
    labels = torch.arange(10).repeat_interleave(20)
    seeds = torch.cat([torch.arange(80 * c, 80 * c + 20) for c in range(10)])  # the first of each class's 80
    drawn = Labelled(sampler(labels.tolist(), seeds.tolist())[:, 0], labels)
    assert curve.rows[0].accuracy == judge.accuracy(drawn)
    assert curve.rows[0].frechet == pytest.approx(
        judge.frechet(drawn, judge.real), rel=1e-6
    )  # sums in another order
    assert curve.rows[0].score == pytest.approx(float(judge.margins(drawn).mean()))


def test_the_curve_says_what_it_is_of(curve: BestOfCurve, judge: DigitsJudge) -> None:
    text = curve.as_markdown()
    assert "The best 20 of each class by judge" in text and "| 0.25 | 80 |" in text
    assert "distance and spread tell" in text
    found = json.loads(json.dumps(curve.as_dict()))
    assert found["score"] == {"name": "judge", "digest": judge.digest}
    assert len(found["rows"]) == 3 and found["num_real"] == 400


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shares": ()}, r"there must be a share, .* got \[\] and 40"),
        ({"images_per_class": 1}, "images_per_class must be at least 2, got"),
        ({"shares": (0.5, 0.0)}, "keep must be a share .* got 0.0"),
        ({"shares": (2.0,)}, "got 2.0"),
    ],
)
def test_bad_input_is_refused(judge: DigitsJudge, given: dict[str, Any], message: str) -> None:
    sampler: Any = Mixed(judge.train)
    with pytest.raises(ValueError, match=message):
        best_of_curve(sampler, JudgeMargin(judge), judge=judge, **given)
