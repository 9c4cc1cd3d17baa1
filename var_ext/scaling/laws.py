"""Power laws L = E + (beta X)^-alpha, fitted to many draws of a ladder at once, and those that the paper published."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

ALPHAS = np.geomspace(1e-4, 5, 80)  # the published exponents go from .0067 to .23
UNITS = {"size": (1e9, "billion parameters"), "flops": (1e15, "PFLOP")}  # of beta, as in the paper


@dataclass(frozen=True)
class Law:
    """L = E + (beta X)^-alpha (arXiv 2404.02905, section 5.2, where E is fixed and alpha has the other sign).

    A law, or many, one a draw: alpha, log_beta (natural logarithm, X in parameters or FLOP) and irreducible, E, are
    float64 and have one shape, () or (D,).
    """

    alpha: Array
    log_beta: Array
    irreducible: Array

    @classmethod
    def of(cls, alpha: float, beta: float, irreducible: float, axis: str) -> Law:
        """A law as it is published: beta for X in billion parameters (axis "size") or in PFLOP ("flops")."""
        log_beta = np.log(beta / UNITS[axis][0])
        return cls(np.float64(alpha), np.float64(log_beta), np.float64(irreducible))

    def reducible(self, x: ArrayLike) -> Array:
        """(beta X)^-alpha: X (n,) -> (..., n)."""
        alpha, log_beta = np.asarray(self.alpha)[..., None], np.asarray(self.log_beta)[..., None]
        return np.exp(-alpha * (np.log(np.atleast_1d(np.asarray(x, float))) + log_beta))

    def loss(self, x: ArrayLike) -> Array:
        """The loss at X: (n,) -> (..., n)."""
        return np.asarray(self.irreducible)[..., None] + self.reducible(x)

    def log10_beta(self, axis: str) -> Array:
        """log10 of beta for X in the paper's units."""
        return np.asarray((self.log_beta + np.log(UNITS[axis][0])) / np.log(10))


# Equations 7-8 and 13-14 of the paper, with E as it was given; errors in percent, of which nothing is taken off.
PAPER = {
    ("size", "loss_last"): Law.of(0.23, 2.0, 4.5, "size"),
    ("size", "loss_avg"): Law.of(0.20, 2.5, 5.0, "size"),
    ("size", "err_last"): Law.of(0.016, 4.9e2, 0, "size"),
    ("size", "err_avg"): Law.of(0.010, 6.5e2, 0, "size"),
    ("flops", "loss_last"): Law.of(0.13, 2.2e-5, 4.5, "flops"),
    ("flops", "loss_avg"): Law.of(0.16, 1.5e-5, 5.0, "flops"),
    ("flops", "err_last"): Law.of(0.0067, 8.1e-2, 0, "flops"),
    ("flops", "err_avg"): Law.of(0.011, 4.4e-2, 0, "flops"),
}


def fit_law(
    x: ArrayLike, loss: ArrayLike, weights: ArrayLike | None = None, irreducible: float | None = None
) -> Law:
    """Least squares of L = E + (beta X)^-alpha, of every draw at once.

    For a given alpha the law is a line in X^-alpha, whose E and beta have a closed form (variable projection); alpha is
    searched on a grid in [1e-4, 5] and then by golden sections, so no start has to be guessed.

    Args:
        x: (n,) positive, in parameters or FLOP.
        loss: (n,) or (D, n), a row a draw.
        weights: (n,) 1 / variance of each loss; None: equal.
        irreducible: E; None: free in [0, smallest loss of the draw), the bound kept a thousandth of the range of losses
            below it, so that L - E has a logarithm.

    Returns:
        a law of each draw, fields () or (D,).

    Raises:
        ValueError: fewer points than free parameters, or an X that is not positive.
    """
    x, y = np.asarray(x, float), np.atleast_2d(np.asarray(loss, float))
    w = np.ones_like(x) if weights is None else np.asarray(weights, float)
    least = 3 if irreducible is None else 2
    if len(x) < least or not (x > 0).all():
        raise ValueError(f"a law needs {least} points with X > 0, got {len(x)}: {x}")
    w = w / w.sum()
    z = np.log(x) - np.log(x).mean()
    if irreducible is None:
        low, high = np.zeros(len(y)), np.maximum(y.min(1) - 1e-3 * np.ptp(y, axis=1), 0)
    else:
        low = high = np.full(len(y), float(irreducible))

    def line(alpha: Array) -> tuple[Array, Array, Array]:
        """E, factor of X^-alpha and sum of squares of each draw, at one alpha a draw."""
        u = np.exp(-alpha[:, None] * z)
        mean_u, mean_y = u @ w, y @ w
        slope = (u * y @ w - mean_u * mean_y) / (u * u @ w - mean_u**2)
        e = np.clip(mean_y - slope * mean_u, low, high)
        b = np.maximum((u * (y - e[:, None])) @ w / (u * u @ w), 1e-300)
        return e, b, (y - e[:, None] - b[:, None] * u) ** 2 @ w

    squares = np.stack([line(alpha[None])[2] for alpha in ALPHAS])
    best = squares.argmin(0)
    left, right = (
        np.log(ALPHAS[np.maximum(best - 1, 0)]),
        np.log(ALPHAS[np.minimum(best + 1, len(ALPHAS) - 1)]),
    )
    golden = (5**0.5 - 1) / 2
    for _ in range(32):  # to 1e-7 of a cell
        a, b = right - golden * (right - left), left + golden * (right - left)
        lower = line(np.exp(a))[2] < line(np.exp(b))[2]
        left, right = np.where(lower, left, a), np.where(lower, b, right)
    alpha = np.exp((left + right) / 2)
    e, b, _ = line(alpha)
    log_beta = -np.log(b) / alpha - np.log(x).mean()
    found = (alpha, log_beta, e) if np.ndim(loss) == 2 else (alpha[0], log_beta[0], e[0])
    return Law(*found)
