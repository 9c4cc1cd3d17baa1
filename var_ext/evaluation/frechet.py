"""Distances between sets of images: Fréchet between Gaussians, Euclidean between single images."""

from __future__ import annotations

import torch
from torch import Tensor

from var_ext.evaluation.moments import Moments


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance of a set.

    Args:
        features: (N, D) floats, N >= 2.

    Returns:
        (D,) and (D, D), float64, on the CPU.

    Raises:
        ValueError: not a matrix, fewer than two rows, or a value that is not finite.
    """
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(f"features must have shape (N, D) with N >= 2, got {tuple(features.shape)}")
    moments = Moments()
    moments.add(features)
    return moments.gaussian()


def gaussian_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson and Landau 1982), in float64.

    |m_a - m_b|^2 + tr(S_a + S_b) - 2 |F_a^T F_b|_*, the nuclear norm, where S = F F^T. It is the trace of
    (S_a S_b)^1/2 without a root of what rounding left of the eigenvalues that are 0: with fewer images than features
    those are most of the error, 2e-6 of the distance in (S_a^1/2 S_b S_a^1/2)^1/2 and 2e-7 in sqrtm(S_a S_b).

    Args:
        mean_a, mean_b: (D,).
        cov_a, cov_b: (D, D), symmetric, positive semi-definite.
    """
    overlap = torch.linalg.svdvals(_factor(cov_a).T @ _factor(cov_b)).sum()
    shift = (mean_a.double() - mean_b.double()).square().sum()
    distance = shift + cov_a.double().trace() + cov_b.double().trace() - 2 * overlap
    return float(distance.clamp_min(0))  # rounding can make it negative


def _factor(covariance: Tensor) -> Tensor:
    """F with S = F F^T: (D, D) -> (D, rank), float64."""
    values, vectors = torch.linalg.eigh(covariance.double())
    positive = values > 0  # rounding makes some of those that are 0 negative
    return vectors[:, positive] * values[positive].sqrt()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features.

    An estimate from finite sets is biased upwards, more so for small sets: compare at equal set sizes.

    Args:
        a, b: (N, D) and (M, D) floats; N, M >= 2.

    Raises:
        ValueError: shapes that do not match, too few rows, or values that are not finite.
    """
    if a.ndim == 2 and b.ndim == 2 and a.shape[1] != b.shape[1]:
        raise ValueError(
            f"both sets must have the same number of features, got {a.shape[1]} and {b.shape[1]}"
        )
    return gaussian_distance(*gaussian(a), *gaussian(b))


def pixel_distances(a: Tensor, b: Tensor, *, exact: bool = True) -> Tensor:
    """Euclidean distances of all pairs.

    Args:
        a, b: (N, ...) and (M, ...) images of one shape.
        exact: from differences, so that equal images have distance 0; else from inner products: many times
            faster, and below 1e-6 off for images in [0, 1] unless the two are nearly equal.

    Returns:
        (N, M) float64.

    Raises:
        ValueError: images of different shapes.
    """
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"images must have one shape, got {tuple(a.shape[1:])} and {tuple(b.shape[1:])}")
    mode = "donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist"
    return torch.cdist(a.flatten(1).double(), b.flatten(1).double(), compute_mode=mode)
