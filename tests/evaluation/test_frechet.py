"""Fréchet distances against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from var_ext.evaluation.frechet import frechet_distance, gaussian, gaussian_distance, pixel_distances


def test_equal_sets_have_distance_zero() -> None:
    x = torch.randn(50, 7)
    # Rounding of sums of 7 traces near 1 in fp64.
    assert frechet_distance(x, x.flip(0)) < 1e-12


def test_a_shift_costs_its_square() -> None:
    x, shift = torch.randn(40, 5).double(), torch.tensor([3.0, 0, -1, 0, 2])
    assert frechet_distance(x, x + shift) == pytest.approx(14, abs=1e-10)  # same covariance, 9 + 1 + 4


def test_a_scaling_costs_what_its_standard_deviations_differ_by() -> None:
    x = torch.randn(30, 4).double()
    x -= x.mean(0)
    # S_b = 9 S_a: tr(S_a + 9 S_a - 2 * 3 S_a) = 4 tr S_a
    expected = 4 * float(gaussian(x)[1].trace())
    assert frechet_distance(x, 3 * x) == pytest.approx(expected, rel=1e-12)


def test_diagonal_covariances() -> None:
    a, b = torch.tensor([4.0, 9.0, 0.0]), torch.tensor([1.0, 16.0, 25.0])
    zero = torch.zeros(3)
    expected = float((a.sqrt() - b.sqrt()).square().sum())  # 1 + 1 + 25; one of the two is rank-deficient
    assert gaussian_distance(zero, a.diag(), zero, b.diag()) == pytest.approx(expected, abs=1e-12)


def test_covariances_that_do_not_commute() -> None:
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    b = torch.tensor([[5.0, -2.0], [-2.0, 1.0]])
    product = a @ b
    # For 2 x 2: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    root = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product.double()))))
    expected = 5.0 + 6.0 - 2 * root
    zero = torch.zeros(2)
    assert gaussian_distance(zero, a, zero, b) == pytest.approx(expected, rel=1e-12)
    assert gaussian_distance(zero, b, zero, a) == pytest.approx(expected, rel=1e-12)


def test_fewer_images_than_features() -> None:
    x, y = torch.randn(5, 20), torch.randn(6, 20)
    value = frechet_distance(x, y)
    assert math.isfinite(value) and value > 0
    assert frechet_distance(x, x) < 1e-12


def test_singular_covariances_lose_nothing() -> None:
    """The exact value takes no root of a covariance: of n images, tr (S_a S_b)^1/2 = |A B^T|_* / (n - 1), centred."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(300, 300, generator=generator).double()
    x, y = (torch.randn(60, 300, generator=generator).double() @ mixed + 40 for _ in "ab")
    a, b = x - x.mean(0), y - y.mean(0)
    overlap = torch.linalg.svdvals(a @ b.T).sum() / 59
    spread = (a.square().sum() + b.square().sum()) / 59
    expected = float((x.mean(0) - y.mean(0)).square().sum() + spread - 2 * overlap)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-11)  # 2e-8 by roots of roots


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(4, 3), r"\(N, D\) with N >= 2, got \(1, 3\)"),
        (torch.zeros(4, 3, 1), torch.zeros(4, 3), r"\(N, D\)"),
        (torch.zeros(4, 3), torch.zeros(4, 2), "same number of features, got 3 and 2"),
        (torch.zeros(4, 3), torch.full((4, 3), math.nan), "finite"),
    ],
)
def test_refuses_what_has_no_distance(a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_pixel_distances() -> None:
    a = torch.rand(6, 4, 4)
    b = torch.cat([a[2:3], torch.rand(3, 4, 4)])
    exact = pixel_distances(a, b)
    assert exact.shape == (6, 4)
    assert exact[2, 0] == 0  # a copy is found as such
    expected = (a[5].double() - b[3].double()).square().sum().sqrt()
    assert float(exact[5, 3]) == pytest.approx(float(expected), rel=1e-14)
    # Cancellation of squared norms near 5 in fp64 leaves 1e-15 in the square, 1e-7 in a distance of 0.
    assert torch.allclose(pixel_distances(a, b, exact=False), exact, atol=1e-6)
    with pytest.raises(ValueError, match=r"one shape, got \(4, 4\) and \(3, 4\)"):
        pixel_distances(a, torch.rand(2, 3, 4))
