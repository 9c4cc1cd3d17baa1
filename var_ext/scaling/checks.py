"""What a power law has to show before it is called one, and the verdict in words.

A correlation alone proves nothing: with few sizes and a free E, |r| > .99 comes out of curves that are no law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from var_ext.scaling.intervals import TWO_SIGMA, Points, Spread, excess_over, spread
from var_ext.scaling.laws import Array, Law

SIZES, DECADES, CORRELATION, OF_LOSS, OF_REDUCIBLE = 5, 1.5, -0.99, 1.0, 5.0

HOLDS, FAILS, TOO_LITTLE = "holds", "does not hold", "too little data"


@dataclass(frozen=True)
class Check:
    """One test. passed: None where the data do not suffice to say. figure: what came and what was wanted."""

    name: str
    passed: bool | None
    figure: str
    value: float | None = None


def verdict(checks: Sequence[Check]) -> tuple[str, str]:
    """`HOLDS`, `FAILS` or `TOO_LITTLE`, and the figures of the tests that say so."""
    for outcome, passed in ((FAILS, False), (TOO_LITTLE, None)):
        if found := [f"{check.name}: {check.figure}" for check in checks if check.passed is passed]:
            return outcome, "; ".join(found)
    return HOLDS, "; ".join(f"{check.name}: {check.figure}" for check in checks)


def extent(sizes: int, x: Array) -> list[Check]:
    """Whether there are enough sizes, and over a range wide enough to tell a power from another curve."""
    decades = float(np.log10(x.max() / x.min()))
    return [
        Check("sizes", True if sizes >= SIZES else None, f"{sizes} (at least {SIZES})", sizes),
        Check(
            "range",
            True if decades >= DECADES else None,
            f"{decades:.2f} decades (at least {DECADES})",
            decades,
        ),
    ]


def correlation(points: Points, law: Law) -> Check:
    """Pearson's r of log(L - E) against log X."""
    name, above = "correlation", points.loss - law.irreducible
    if not (above > 0).all():
        return Check(name, False, f"none, E = {float(law.irreducible):.4g} is above a loss")
    r = float(np.corrcoef(np.log(points.x), np.log(above))[0, 1])
    return Check(name, r <= CORRELATION, f"r = {r:.4f} (at most {CORRELATION})", r)


def curvature(points: Points, law: Law, irreducible: float | None, around: Spread | None) -> Check:
    """The quadratic term of log10(L - E) in log10 X, in sigmas of what it is for draws of the law itself.

    Draws have their own E, so what E takes up of a curve is accounted for. Half the width of their central 95.45% is
    two sigma, which holds for few degrees of freedom too. Scatter that no parabola explains and that exceeds the noise
    of runs widens sigma; without a known noise it is all that sigma comes from.
    """
    name = "curvature"
    least = points.parameters(law, irreducible) + 2
    if around is None or (not points.noise.known and len(np.unique(points.group)) < least):
        return Check(name, None, f"cannot be told of {len(points.x)} points {points.noise}")
    (q,), (rest,) = _quadratic(points, points.loss[None], law.irreducible[None])
    drawn, drawn_rest = _quadratic(points, around.losses, around.laws.irreducible)
    drawn /= around.excess  # which a curve may have caused itself
    if points.noise.known:
        sigma = np.quantile(abs(drawn), TWO_SIGMA) / 2 * excess_over(drawn_rest / around.excess**2, rest)
    else:
        sigma = np.sqrt(rest) * np.quantile(abs(drawn) / np.sqrt(drawn_rest), TWO_SIGMA) / 2
    sigmas = float(q / max(sigma, 1e-300))
    return Check(name, abs(sigmas) <= 2, f"{q:+.3g} a decade squared, {sigmas:+.1f} sigma (within 2)", sigmas)


def _quadratic(points: Points, losses: Array, irreducible: Array) -> tuple[Array, Array]:
    """Quadratic terms (D,) of the weighted parabola through log10(L - E), and what it leaves of weighted squares."""
    above = np.maximum(losses - irreducible[:, None], 1e-9 * points.loss)
    t, x = np.log10(above), np.log10(points.x / points.x[0])
    # of the weight: an error of ln(L - E) is that of L over L - E
    root = above / np.sqrt(points.variance)
    powers = np.stack([x**0, x, x**2], 1)
    solved = (np.linalg.pinv(root[:, :, None] * powers) @ (root * t)[:, :, None])[..., 0]  # (D, 3)
    rest = root * (t - solved @ powers.T) * np.log(10)
    return solved[:, 2], (rest**2).sum(1)


def _off(said: Array, loss: Array, irreducible: float) -> tuple[Array, Array]:
    """By how many percent of L and of L - E losses that a law says are off."""
    above = np.where(loss > irreducible, loss - irreducible, np.nan)
    return 100 * (said / loss - 1), np.nan_to_num(100 * (said - loss) / above, nan=np.inf)


def _within(of_loss: float, of_reducible: float) -> bool:
    return bool(abs(of_loss) <= OF_LOSS and abs(of_reducible) <= OF_REDUCIBLE)


LIMITS = (
    "{:+.2f}% of L (within " + f"{OF_LOSS:g}%) and " + "{:+.1f}% of L - E (within " + f"{OF_REDUCIBLE:g}%)"
)


def residuals(points: Points, law: Law, around: Spread | None) -> Check:
    """Whether the law passes by its own points as closely as by one that it predicts.

    Where it does not and the known noise of runs explains it, nothing can be said.
    """
    of_loss, of_reducible = _off(law.loss(points.x), points.loss, float(law.irreducible))
    passed = all(map(_within, of_loss, of_reducible))
    worst = int(abs(of_reducible).argmax())
    figure = f"at worst {LIMITS.format(of_loss[worst], of_reducible[worst])}"
    if around is not None and around.excess > 1:
        figure += f", {around.excess:.1f} times the noise of runs"
    explained = points.noise.known and around is not None and around.excess == 1
    return Check("residuals", passed or (None if explained else False), figure, float(of_reducible[worst]))


def prediction(
    fewer: Points | None, x: float, loss: float, irreducible: float | None, *, draws: int, seed: int
) -> Check:
    """The law of the points without the largest size, asked for the loss at `x`, which was `loss`.

    It has to be within 1% of L and 5% of L - E. A miss that the known noise of runs explains is no failure, nor a pass;
    where no noise is known, a miss is the law's.
    """
    name, least = "prediction", 2 if irreducible is not None else 3
    if fewer is None or len(fewer.x) < least:
        return Check(name, None, f"needs {least} sizes beside the largest")
    law = fewer.fit(irreducible)
    (said,) = law.loss(x)
    (of_loss,), (of_reducible,) = _off(np.array([said]), np.array([loss]), float(law.irreducible))
    passed: bool | None = _within(of_loss, of_reducible)
    figure = f"{said:.4g} for {loss:.4g}, {LIMITS.format(of_loss, of_reducible)}"
    around = None
    if fewer.noise.known:
        around = spread(fewer, law, irreducible, widen=False, draws=draws, seed=seed)
    if around is not None:
        low, high = around.interval(around.laws.loss(x)[:, 0], TWO_SIGMA)
        figure += f", two sigma of the noise of runs is {low:.4g} to {high:.4g}"
        if not passed and low <= loss <= high:
            passed, figure = None, f"{figure}: too large to say"
    return Check(name, passed, figure, float(of_loss))
