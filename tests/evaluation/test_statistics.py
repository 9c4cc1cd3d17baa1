"""Moments, Inception Score, precision and recall, kernel distance: closed forms, and ADM's by brute force."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from tests.evaluation import adm
from tests.evaluation.fidelity_checkout import module, with_torch_fidelity
from var_ext.evaluation.frechet import frechet_distance, gaussian_distance
from var_ext.evaluation.inception_score import InceptionScore
from var_ext.evaluation.kernel_distance import kernel_distance, mmd
from var_ext.evaluation.manifolds import distances, precision_recall
from var_ext.evaluation.moments import Moments


def score(logits: torch.Tensor, *, batch: int = 7, **options: int) -> float:
    found = InceptionScore(len(logits), **options)
    for i in range(0, len(logits), batch):
        found.add(i, logits[i : i + batch])
    return found.value()


@pytest.fixture(scope="module")
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    """2000 features and 500 of another distribution, correlated and not negative, as Inception's are."""
    torch.manual_seed(1)
    mix = torch.randn(96, 96) / 10
    return (torch.randn(2000, 96) @ mix + 0.3).relu(), (torch.randn(500, 96) @ mix * 1.2 + 0.4).relu()


@pytest.mark.parametrize("parts", [[100], [1, 99], [33, 0, 33, 34]])
def test_moments_are_those_of_all_at_once(parts: list[int]) -> None:
    x = torch.randn(100, 6) + 1000  # far from the origin, where sums of squares would lose their digits
    moments = Moments()
    for part in x.split(parts):
        moments.add(part)
    mean, covariance = moments.gaussian()
    np.testing.assert_allclose(mean, x.double().mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-11, atol=1e-12)


def test_moments_refuse_what_has_none() -> None:
    moments = Moments()
    moments.add(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        moments.gaussian()
    moments.add(torch.tensor([[0, torch.nan, 1]]))
    with pytest.raises(ValueError, match="finite"):
        moments.gaussian()


def test_frechet_is_that_of_adm_and_of_torch_fidelity(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    ours = frechet_distance(*sets)
    a, b = (x.double().numpy() for x in sets)
    assert ours == pytest.approx(adm.frechet(a, b), rel=1e-9)
    assert ours == pytest.approx(adm.frechet_by_eigenvalues(a, b), rel=1e-8)
    # fewer images than features: covariances are singular, and sqrtm loses half its digits
    few = adm.frechet_by_eigenvalues(a[:50], b[:60])
    assert frechet_distance(sets[0][:50], sets[1][:60]) == pytest.approx(few, rel=1e-6)


@pytest.mark.slow
def test_frechet_of_inceptions_size_takes_seconds() -> None:
    root = torch.randn(2048, 2048, dtype=torch.float64) / 45
    covariance, zero = root @ root.T, torch.zeros(2048)
    begin = time.perf_counter()
    # b = 4 a commutes with it: tr(a + 4 a - 2 * 2 a) = tr a
    found = gaussian_distance(zero, covariance, zero, 4 * covariance)
    print(f"{time.perf_counter() - begin:.1f} s")
    assert found == pytest.approx(float(covariance.trace()), rel=1e-9)


def test_inception_score_in_closed_form() -> None:
    certain = torch.eye(10).repeat(5, 1) * 1000  # each image sure of its class, classes equally often
    assert score(certain) == pytest.approx(10, rel=1e-12)
    assert score(torch.zeros(20, 10)) == pytest.approx(1, abs=1e-12)  # nothing is known of any
    assert score(certain[:1].repeat(9, 1)) == pytest.approx(1, abs=1e-12)  # all of one class
    # two of four classes with certainty, the other half of the images undecided between all four
    mixed = torch.cat([torch.eye(4)[:2].repeat(5, 1) * 1000, torch.zeros(10, 4)])
    p = np.array([0.375, 0.375, 0.125, 0.125])
    wanted = np.exp(0.5 * np.log(0.25) - (p * np.log(p)).sum())
    assert score(mixed) == pytest.approx(wanted, rel=1e-12)


def test_inception_score_suffers_from_class_order() -> None:
    """As in ADM's evaluator: a chunk of one class scores 1, whatever the whole set is worth."""
    ordered = torch.eye(10).repeat_interleave(20, 0) * 1000
    assert score(ordered, chunk=20) == pytest.approx(1)
    assert score(ordered, chunk=40) == pytest.approx(2)
    assert score(ordered, chunk=20, shuffle=2020) > 5
    assert (
        score(ordered, chunk=200) == pytest.approx(score(ordered, chunk=200, shuffle=1)) == pytest.approx(10)
    )


def test_inception_score_is_that_of_adm_and_of_torch_fidelity() -> None:
    logits = torch.randn(1234, 30) * 3
    assert score(logits, chunk=500) == pytest.approx(adm.inception_score(logits.numpy(), 500), rel=1e-12)
    shuffled = logits[np.random.RandomState(2020).permutation(1234)]
    wanted = adm.inception_score(shuffled.numpy(), 500)
    assert score(logits, chunk=500, shuffle=2020) == pytest.approx(wanted, rel=1e-12)
    assert score(logits, chunk=500, batch=1000) == pytest.approx(score(logits, chunk=500, batch=1), rel=1e-13)
    with pytest.raises(ValueError, match="got none"):
        InceptionScore(0).value()


def test_precision_and_recall_of_constructed_sets() -> None:
    # two clusters far apart, each of 8 points within 1
    near, far = torch.rand(8, 4), torch.rand(8, 4) + 50
    both = torch.cat([near, far])
    for half in (True, False):
        assert precision_recall(both, both, half=half).__dict__ == dict(precision=1, recall=1, fallbacks=0)
        found = precision_recall(near.clone(), both, half=half)
        assert (found.precision, found.recall) == (1, 0.5)  # good pictures, half of what there is
        found = precision_recall(both, near.clone(), half=half)
        assert (found.precision, found.recall) == (0.5, 1)
        found = precision_recall(near, far, half=half)
        assert (found.precision, found.recall) == (0, 0)


def test_radii_reach_to_the_third_other() -> None:
    """On a line at 0, 1, 2, 3, 10: the ball around 0 has radius 3, that around 10 radius 9."""
    line = torch.tensor([[0.0], [1], [2], [3], [10]])
    others = torch.tensor([[-3.0], [-3.5], [19], [19.5], [6], [100]])
    found = precision_recall(others, line, half=False)
    assert found.precision == pytest.approx(3 / 6)  # -3 and 19 on the rim, 6 inside the ball of 10


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("block", [10_000, 700, 333])
def test_precision_and_recall_are_those_of_adm(
    sets: tuple[torch.Tensor, torch.Tensor], half: bool, block: int
) -> None:
    a, b = sets
    done: list[int] = []
    found = precision_recall(a, b, half=half, block=block, step=done.append)
    assert (found.precision, found.recall) == adm.precision_recall(
        a.numpy(), b.numpy(), half=half, block=block
    )
    assert 0 < found.precision < 1 and 0 < found.recall < 1 and found.fallbacks == 0
    assert sum(done) == distances(len(a), len(b))


def test_a_block_that_overflows_is_computed_in_float32(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, b = sets[0][:600].clone(), sets[1][:300]
    a[450] *= 200  # its square is beyond 65504
    found = precision_recall(a, b, half=True, block=200)
    # of the samples' 9 blocks the 5 in its row and column, of the 6 between both sets 2
    assert found.fallbacks == 5 + 2
    assert (found.precision, found.recall) == adm.precision_recall(a.numpy(), b.numpy(), half=True, block=200)


def test_too_few_for_a_radius() -> None:
    with pytest.raises(ValueError, match="k = 3 need at least 4 reference, got 3"):
        precision_recall(torch.rand(5, 2), torch.rand(3, 2), half=False)


def test_kernel_distance_is_that_of_torch_fidelity(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, b = sets
    found = kernel_distance(a.__getitem__, b.__getitem__, (len(a), len(b)), subsets=7, size=100)
    wanted = adm.kernel_distance(a.double().numpy(), b.double().numpy(), 7, 100)
    assert (found.mean, found.deviation) == pytest.approx(wanted, rel=1e-10)
    assert kernel_distance(a.__getitem__, b.__getitem__, (9, 30), subsets=1).size == 9
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(a.__getitem__, b.__getitem__, (1, 30))


def test_kernel_distance_is_not_biased_by_the_number_of_images() -> None:
    torch.manual_seed(0)
    drawn = [mmd(torch.randn(20, 3), torch.randn(20, 3)) for _ in range(400)]
    deviation = np.std(drawn) / 400**0.5
    assert abs(np.mean(drawn)) < 3 * deviation  # its expectation is 0, and some are below
    assert min(drawn) < 0 < max(drawn)


@with_torch_fidelity
def test_figures_are_those_of_torch_fidelity_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """2000 features of each set, of 256 dimensions; its defaults but the sizes."""
    mix = torch.randn(256, 256) / 16
    a, b = (torch.randn(2000, 256) @ mix + 0.3).relu(), (torch.randn(2000, 256) @ mix * 1.05 + 0.32).relu()

    theirs = module("metric_fid", monkeypatch)
    wanted = theirs.fid_statistics_to_metric(*(theirs.fid_features_to_statistics(x) for x in (a, b)), False)
    assert frechet_distance(a, b) == pytest.approx(wanted["frechet_inception_distance"], rel=1e-6)

    logits = torch.randn(2000, 1008) * 2
    theirs = module("metric_isc", monkeypatch)
    wanted = theirs.isc_features_to_metric(logits)["inception_score_mean"]
    assert score(logits, chunk=200, shuffle=2020) == pytest.approx(wanted, rel=1e-9)

    theirs = module("metric_prc", monkeypatch)
    found = precision_recall(a, b, half=False)
    assert 0 < found.precision < 1 and 0 < found.recall < 1
    # distances on the rim of a ball fall to either side: theirs are roots, ours squares
    assert (found.precision, found.recall) == pytest.approx(
        theirs.calculate_precision_recall_full(a, b), abs=1.5 / 2000
    )

    theirs = module("metric_kid", monkeypatch)
    wanted = theirs.kid_features_to_metric(a, b, kid_subsets=10, kid_subset_size=500)
    kernel = kernel_distance(a.__getitem__, b.__getitem__, (2000, 2000), subsets=10, size=500)
    names = ("kernel_inception_distance_mean", "kernel_inception_distance_std")
    # theirs are float32
    assert (kernel.mean, kernel.deviation) == pytest.approx(tuple(wanted[name] for name in names), rel=2e-3)
