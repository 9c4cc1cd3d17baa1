"""How alike two images are, pixel by pixel: PSNR and SSIM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SIGMA, RADIUS = 1.5, 5  # of the Gaussian window, 11 x 11
LEAST_ERROR = 1e-10  # mean squared error that PSNR tells from 0
LEAST = 2 * RADIUS + 1  # pixels a side that SSIM needs
K1, K2 = 0.01, 0.03


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, at most 100, which equal images have: a mean over images stays finite.

    Args:
        a, b: (B, C, H, W) floats in [0, 1].

    Returns:
        (B,) float64.

    Raises:
        ValueError: the shapes differ.
    """
    _check(a, b, 1)
    error = (a.double() - b.double()).square().mean((1, 2, 3))
    return -10 * error.clamp(min=LEAST_ERROR).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13), Gaussian window, mean over channels and all places where the
    window lies inside: what scikit-image gives with gaussian_weights=True, sigma=1.5, use_sample_covariance=False.

    Args:
        a, b: (B, C, H, W) floats in [0, 1], sides of at least 11.

    Returns:
        (B,) float64.

    Raises:
        ValueError: the shapes differ, or the images are smaller than the window.
    """
    _check(a, b, LEAST)
    a, b = a.double(), b.double()
    at = torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64, device=a.device)
    window = torch.exp(-at.square() / (2 * SIGMA**2))
    window = window / window.sum()

    def blur(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)[:, None]  # (B C, 1, H, W)
        flat = F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return flat.view(*x.shape[:2], *flat.shape[2:])

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    likeness = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return (likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))


def _check(a: Tensor, b: Tensor, least: int) -> None:
    if a.ndim != 4 or a.shape != b.shape or min(a.shape[2:]) < least:
        raise ValueError(
            f"images must have one shape (B, C, H, W) with sides of at least {least}, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
