"""How far a fitted law could be off: the noise of runs, and laws fitted to losses drawn with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from var_ext.scaling.laws import Array, Law, fit_law
from var_ext.scaling.runs import Rung

LEVEL = 0.9  # of intervals
TWO_SIGMA = 0.9545


@dataclass(frozen=True)
class Noise:
    """The spread of losses when a training is done again, of another seed, and judged on other images.

    variance: of one run over seeds, pooled over all sizes that have several: few seeds a size say little of its own
    spread, and the pooled one is taken to hold at every size. dof: its degrees of freedom; 0: no size has two seeds.
    """

    variance: float
    dof: int
    validation: bool  # whether standard errors over validation subsets are known besides

    @property
    def known(self) -> bool:
        """False: the noise can only be told from how far points are off a law."""
        return self.variance > 0 or self.validation

    def errors(self, rng: np.random.Generator, draws: int, seeds: Array, error: Array) -> Array:
        """(draws, G) errors of means over seeds (G,) with standard errors (G,) besides.

        The variance is drawn too, a scaled inverse chi-square: few seeds do not tell it well.
        """
        variance = self.variance * self.dof / rng.chisquare(self.dof, draws) if self.dof else np.zeros(draws)
        sd = np.sqrt(variance[:, None] / seeds + error**2)
        return np.asarray(sd * rng.standard_normal((draws, len(seeds))))

    def __str__(self) -> str:
        parts = []
        if self.dof:
            parts.append(f"sd {self.variance**0.5:.2g} over seeds ({self.dof} degrees of freedom)")
        if self.validation:
            parts.append("standard errors over validation subsets")
        return " and ".join(parts) or "without seeds and standard errors, as the residuals say"


def run_noise(rungs: Sequence[Rung], name: str) -> Noise:
    """The noise of results of a loss."""
    several = [[run.last(name) for run in rung.runs] for rung in rungs if len(rung.runs) > 1]
    dof = sum(len(losses) - 1 for losses in several)
    squares = sum(len(losses) * np.var(losses) for losses in several)
    validation = any(rung.mean(f"{name}_se") > 0 for rung in rungs)
    return Noise(float(squares / dof) if dof else 0.0, dof, validation)


@dataclass(frozen=True)
class Points:
    """What a law is fitted to.

    x, loss: (n,) means over seeds at each X. group: (n,) int, points of one number share their noise, as those of one
    curve do. seeds, error: (G,) runs of a group and the standard error over validation subsets, 0 where unknown; images
    are those of all seeds, so it does not shrink with their number.
    """

    x: Array
    loss: Array
    group: np.ndarray
    seeds: Array
    error: Array
    noise: Noise

    @property
    def variance(self) -> Array:
        """(n,) of each mean, up to a factor where the noise is not known."""
        seeds = self.noise.variance / self.seeds if self.noise.known else np.ones_like(self.seeds)
        found = (seeds + self.error**2)[self.group]
        return np.asarray(np.maximum(found, 1e-6 * found.max() or 1.0))  # equal seeds weigh much, not all

    def fit(self, irreducible: float | None) -> Law:
        """The law through these points, each weighted by its noise."""
        return fit_law(self.x, self.loss, 1 / self.variance, irreducible)

    def parameters(self, law: Law, irreducible: float | None) -> int:
        """How many were free: E is not where it is given or lies at the lower bound."""
        return 2 if irreducible is not None or law.irreducible == 0 else 3

    def errors(self, rng: np.random.Generator, draws: int, law: Law, parameters: int) -> Array | None:
        """(draws, n) errors of the losses; None where neither seeds nor standard errors are known and the points are
        too few to tell from residuals."""
        if self.noise.known:
            return self.noise.errors(rng, draws, self.seeds, self.error)[:, self.group]
        groups = np.unique(self.group)
        dof = len(groups) - parameters
        if dof < 1:
            return None
        square = (self.loss - law.loss(self.x)) ** 2
        variance = sum(float(square[self.group == g].mean()) for g in groups) / dof
        alike = np.ones_like(self.seeds)
        return Noise(variance, dof, False).errors(rng, draws, alike, 0 * alike)[:, self.group]

    def without_last(self) -> Points:
        """All but the largest X."""
        return replace(self, x=self.x[:-1], loss=self.loss[:-1], group=self.group[:-1])


@dataclass(frozen=True)
class Spread:
    """Laws that were fitted to drawn losses.

    laws: fields (D,). losses: (D, n) drawn ones. excess: how many times the residuals exceed the noise of runs where
    that is beyond two sigma, else 1; errors were drawn so much larger.
    """

    laws: Law
    losses: Array
    excess: float

    @staticmethod
    def interval(values: Array, level: float = LEVEL) -> tuple[float, float]:
        """The central 90% of (D,)."""
        low, high = np.quantile(values, ((1 - level) / 2, (1 + level) / 2))
        return float(low), float(high)


def spread(
    points: Points, law: Law, irreducible: float | None, *, draws: int, seed: int, widen: bool = True
) -> Spread | None:
    """A parametric bootstrap: losses of the fitted law with the noise of runs, fitted again.

    Returns:
        None where nothing is known of the noise.
    """
    errors = points.errors(np.random.default_rng(seed), draws, law, points.parameters(law, irreducible))
    if errors is None:
        return None
    clean, weights, excess = law.loss(points.x), 1 / points.variance, 1.0
    laws = fit_law(points.x, clean + errors, weights, irreducible)
    if points.noise.known and widen:
        residuals = clean + errors - laws.loss(points.x)
        excess = excess_over(residuals**2 @ weights, float((points.loss - clean) ** 2 @ weights))
        if excess > 1:
            errors = errors * excess
            laws = fit_law(points.x, clean + errors, weights, irreducible)
    return Spread(laws, clean + errors, excess)


def excess_over(drawn: Array, found: float) -> float:
    """By what factor a sum of squares (its root) exceeds drawn ones (D,), if it does by two sigma; else 1."""
    beyond = found > np.quantile(drawn, TWO_SIGMA) and found > 0
    return float(np.sqrt(found / max(np.median(drawn), 1e-300))) if beyond else 1.0
