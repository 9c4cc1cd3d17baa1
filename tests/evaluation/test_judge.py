"""The judge knows real digits, and only those."""

from __future__ import annotations

import pytest
import torch

from var_ext.evaluation import DigitsJudge
from var_ext.evaluation.judge import Labelled, draw_like, grey, halves, moved


def test_classifier_reads_real_test_images() -> None:
    # 99.25% of 400 when written; 0.98 leaves five images for other versions of scikit-learn.
    assert DigitsJudge(32).real_accuracy >= 0.98


def test_classifier_never_saw_what_it_is_judged_by(judge: DigitsJudge) -> None:
    assert judge.nearest(judge.real, judge.train).min() > 0
    assert judge.accuracy(judge.train) > judge.real_accuracy


def test_classifier_fails_on_other_labels_and_on_noise(judge: DigitsJudge) -> None:
    wrong = Labelled(judge.real.images, (judge.real.labels + 1) % 10)
    assert judge.accuracy(wrong) < 0.02
    noise = Labelled(torch.rand(400, 8, 8), judge.real.labels)
    assert judge.accuracy(noise) < 0.3  # chance is 0.1


def test_features_keep_distances_and_see_noise(judge: DigitsJudge) -> None:
    x = judge.features(judge.real.images)
    assert x.shape == (400, 49) and x.dtype == torch.float64
    # Pythagoras: the principal coordinates and what they leave out make up the image.
    centred = judge.real.images.flatten(1).double() - judge.train.images.flatten(1).double().mean(0)
    assert torch.allclose(x.norm(dim=1), centred.norm(dim=1))
    noisy = judge.real.images + 0.1 * torch.randn(400, 8, 8)
    assert judge.features(noisy)[:, -1].mean() > 1.5 * x[:, -1].mean()


def test_judges_agree() -> None:
    one, two = DigitsJudge(8), DigitsJudge(8)
    assert one.frechet(one.real, one.train) == two.frechet(two.real, two.train)


def test_halves_are_disjoint_and_balanced(judge: DigitsJudge) -> None:
    index = Labelled(torch.arange(len(judge.real)), judge.real.labels)
    first, second = halves(index, torch.Generator().manual_seed(3))
    assert sorted(first.images.tolist() + second.images.tolist()) == list(range(400))
    assert first.labels.bincount().tolist() == second.labels.bincount().tolist() == [20] * 10
    again = halves(index, torch.Generator().manual_seed(3))[0]
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, halves(index, torch.Generator().manual_seed(4))[0].images)


def test_halves_leave_out_the_odd_one() -> None:
    items = Labelled(torch.rand(5, 8, 8), torch.tensor([0, 0, 0, 7, 7]))
    first, second = halves(items, torch.Generator())
    assert first.labels.tolist() == second.labels.tolist() == [0, 7]


def test_draw_like(judge: DigitsJudge) -> None:
    like = Labelled(torch.zeros(3, 8, 8), torch.tensor([4, 4, 9]))
    drawn = draw_like(judge.train, like, torch.Generator())
    assert drawn.labels.tolist() == [4, 4, 9]
    assert not torch.equal(drawn.images[0], drawn.images[1])  # without replacement
    with pytest.raises(ValueError, match="class 4 must have at least 2 images, got 1"):
        draw_like(Labelled(torch.zeros(1, 8, 8), torch.tensor([4])), like, torch.Generator())


def test_spread_is_zero_where_all_images_of_a_class_are_equal(judge: DigitsJudge) -> None:
    same = Labelled(judge.real.images[:1].expand(6, -1, -1), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert judge.spread(same) == 0
    pair = Labelled(torch.stack([torch.zeros(8, 8), torch.ones(8, 8)]), torch.tensor([5, 5]))
    assert judge.spread(pair) == pytest.approx(8)  # sqrt(64)


def test_grey_and_moved() -> None:
    images = torch.tensor([0.0, 0.6, 1.5]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert torch.allclose(grey(images), torch.full((1, 2, 2), (0 + 0.6 + 1) / 3))
    corner = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert moved(corner, 1, 0).tolist() == [[[0, 0], [1, 2]]]
    assert moved(corner, 0, -1).tolist() == [[[2, 0], [4, 0]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4,), "at least 8, got 4"),
        ((32.0,), "an integer of at least 8, got 32.0"),
        ((8, "train"), '"test" or "val", got \'train\''),
    ],
)
def test_refuses_bad_arguments(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitsJudge(*arguments)  # type: ignore[arg-type]
