"""Kernel distance (KID, arXiv 1801.01401): the unbiased squared MMD with the kernel (x y / D + 1)^3, over subsets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

SUBSETS, SIZE = 100, 1000
SEED = 2020  # of the subsets: torch-fidelity's


@dataclass(frozen=True)
class KernelDistance:
    """Mean and deviation over subsets of so many images."""

    mean: float
    deviation: float
    subsets: int
    size: int


def kernel_distance(
    samples: Callable[[np.ndarray], Tensor],
    reference: Callable[[np.ndarray], Tensor],
    counts: tuple[int, int],
    *,
    subsets: int = SUBSETS,
    size: int = SIZE,
) -> KernelDistance:
    """Not biased by the number of images, unlike a Fréchet distance; may be slightly below 0 for equal distributions.

    Args:
        samples, reference: features (n, D) of the images with these numbers.
        counts: how many samples and references there are.
        subsets: drawn without replacement each, as torch-fidelity draws them.
        size: images of a subset; fewer where there are fewer.

    Raises:
        ValueError: fewer than two images.
    """
    size = min(size, *counts)
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 images of both kinds, got {counts}")
    random = np.random.RandomState(SEED)
    found = []
    for _ in range(subsets):
        chosen = [random.choice(count, size, replace=False) for count in counts]
        found.append(mmd(samples(chosen[0]), reference(chosen[1])))
    return KernelDistance(float(np.mean(found)), float(np.std(found)), subsets, size)


def mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of two sets (N, D) and (M, D), in float64; both N and M at least 2."""
    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    within = sum(
        float((kernel.sum() - kernel.trace()) / (count * (count - 1)))
        for kernel, count in ((_kernel(x, x), n), (_kernel(y, y), m))
    )
    return within - 2 * float(_kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
