"""Every law of a table of runs: each loss against parameters and against compute, judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from var_ext.scaling.checks import Check, correlation, curvature, extent, prediction, residuals, verdict
from var_ext.scaling.frontier import Curves, IsoFlops, isoflops, read_curves
from var_ext.scaling.intervals import Points, Spread, run_noise, spread
from var_ext.scaling.laws import UNITS, Array, Law
from var_ext.scaling.runs import Runs

AXES = tuple(UNITS)


@dataclass(frozen=True)
class Fit:
    """The law of one loss against one axis, "size" or "flops", and what the tests say of it.

    irreducible: E where it was given. around: laws of drawn losses, None where the noise cannot be told.
    """

    name: str
    axis: str
    irreducible: float | None
    points: Points
    law: Law
    around: Spread | None
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> str:
        """ "holds", "does not hold" or "too little data"."""
        return verdict(self.checks)[0]

    @property
    def reason(self) -> str:
        """Figures of the tests that decided."""
        return verdict(self.checks)[1]

    def predict(self, x: ArrayLike) -> tuple[Array, Array | None]:
        """Losses (n,) of the law at X (n,), and their 90% intervals (n, 2), None where the noise cannot be told."""
        if self.around is None:
            return self.law.loss(x), None
        drawn = self.around.laws.loss(x)
        return self.law.loss(x), np.array([Spread.interval(column) for column in drawn.T])

    def intervals(self) -> dict[str, tuple[float, float]]:
        """90% intervals of alpha, log10_beta (X in the paper's units) and irreducible; none without a known noise."""
        if self.around is None:
            return {}
        laws = self.around.laws
        found = {"alpha": laws.alpha, "log10_beta": laws.log10_beta(self.axis)}
        if self.irreducible is None:
            found["irreducible"] = laws.irreducible
        return {name: Spread.interval(values) for name, values in found.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; X in parameters or FLOP, beta by `UNITS`."""
        values = {
            "alpha": self.law.alpha,
            "log10_beta": self.law.log10_beta(self.axis),
            "irreducible": self.law.irreducible,
        }
        return {
            "loss": self.name,
            "against": self.axis,
            "beta_unit": f"1 / {UNITS[self.axis][1]}",
            "irreducible_given": self.irreducible is not None,
            **{name: float(value) for name, value in values.items()},
            "intervals_90": {name: list(pair) for name, pair in self.intervals().items()},
            "noise": str(self.points.noise),
            "residuals_over_noise": None if self.around is None else self.around.excess,
            "checks": [
                {"name": c.name, "passed": c.passed, "figure": c.figure, "value": _finite(c.value)}
                for c in self.checks
            ],
            "verdict": self.verdict,
            "points": [
                {"x": x, "loss": y}
                for x, y in zip(map(float, self.points.x), map(float, self.points.loss), strict=True)
            ],
        }


@dataclass(frozen=True)
class Study:
    """Result of `fit_runs`: laws, best sizes at fixed compute by loss, losses without a law and why, remarks."""

    source: str
    fits: tuple[Fit, ...]
    curves: Mapping[str, Curves]
    best_sizes: Mapping[str, IsoFlops]
    lacking: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        best = {
            name: {"refused": iso.refused}
            if iso.refused
            else {"exponent": iso.exponent(), "flops": iso.budgets.tolist(), "size": iso.sizes.tolist()}
            for name, iso in self.best_sizes.items()
        }
        return {
            "runs": self.source,
            "fits": [fit.as_dict() for fit in self.fits],
            "isoflops": best,
            "lacking": dict(self.lacking),
            "notes": list(self.notes),
        }


def fit_runs(
    runs: Runs,
    *,
    irreducible: Mapping[str, float] | None = None,
    before_anneal: float | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Study:
    """Fits and judges L = E + (beta X)^-alpha for every loss against parameters and, with FLOP, along the frontier.

    Args:
        runs: of `read_runs`.
        irreducible: loss to an E that is taken as given, as in the paper; such a law stands beside the one of a free E.
        before_anneal: of curves, see `read_curves`; results alone make the law against parameters.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: fewer than three sizes, an E of a loss that is not there or that is not below its smallest value.
    """
    irreducible = irreducible or {}
    _check_given(runs, irreducible)
    fits: list[Fit] = []
    curves: dict[str, Curves] = {}
    lacking: dict[str, str] = {}
    for name in runs.losses:
        if np.ptp([run.last(name) for run in runs.runs]) == 0:
            lacking[name] = f"every run has {runs.runs[0].last(name):g}"
            continue
        try:
            curves[name] = read_curves(runs, name, before_anneal)
        except ValueError as error:
            lacking["flops"] = str(error)
        given = dict.fromkeys((None, irreducible.get(name)))
        points = size_points(runs, name)
        fits += [
            _judged(name, "size", e, points, points.without_last(), len(points.x), draws, seed) for e in given
        ]
        if name in curves:
            points, fewer = _frontier(runs, curves[name], name)
            if len(points.x) < 3:
                lacking[f"{name} against flops"] = (
                    f"the frontier has {len(points.x)} points where neither the smallest nor the largest size is best, "
                    "and a law needs 3"
                )
                continue
            sizes = len(set(curves[name].sizes))
            fits += [_judged(name, "flops", e, points, fewer, sizes, draws, seed) for e in given]
    notes = [*_short_trainings(fits, curves), *_notes(runs, bool(curves), before_anneal)]
    best = {name: isoflops(curve) for name, curve in curves.items()}
    return Study(runs.source, tuple(fits), curves, best, lacking, tuple(notes))


def _short_trainings(fits: Sequence[Fit], curves: Mapping[str, Curves]) -> list[str]:
    """Where a frontier comes from how long the sizes were trained."""
    notes = []
    for fit in fits:
        if fit.axis == "flops" and fit.irreducible is None and curves[fit.name].crossing:
            short = int((~curves[fit.name].between(fit.points.x)).sum())
            if short:
                notes.append(
                    f"{fit.name}: at {short} of {len(fit.points.x)} budgets of the frontier the best size is the "
                    "smallest or the largest that reaches them, so a smaller one trained longer, or a larger one, "
                    "might be better"
                )
    return notes


def _check_given(runs: Runs, irreducible: Mapping[str, float]) -> None:
    sizes = {run.size for run in runs.runs}
    if len(sizes) < 3:
        raise ValueError(f"{runs.source}: a law needs at least 3 sizes, got {len(sizes)}: {sorted(sizes)}")
    for name, value in irreducible.items():
        if name not in runs.losses:
            raise ValueError(f"E was given for {name}: there are {', '.join(runs.losses)}")
        smallest = min(run.last(name) for run in runs.runs)
        if not 0 <= value < smallest:
            raise ValueError(f"E of {name} must be in [0, {smallest:g}), its smallest value, got {value:g}")


def size_points(runs: Runs, name: str) -> Points:
    """Results of the longest training of each size, means over its seeds."""
    longest = list({rung.size: rung for rung in runs.rungs()}.values())
    return Points(
        np.array([rung.size for rung in longest]),
        np.array([rung.mean(name) for rung in longest]),
        np.arange(len(longest)),
        np.array([float(len(rung.runs)) for rung in longest]),
        np.array([rung.mean(f"{name}_se") for rung in longest]),
        run_noise(runs.rungs(), name),
    )


def _frontier(runs: Runs, curves: Curves, name: str) -> tuple[Points, Points | None]:
    """The frontier, and that without the largest size; None where smaller ones were trained on as much, so that nothing
    is left to predict."""
    noise = run_noise(runs.rungs(), name)
    points, fewer = curves.frontier(noise), curves.without_largest().frontier(noise)
    return points, None if len(fewer.x) and fewer.x[-1] >= points.x[-1:].sum() else fewer


def _judged(
    name: str,
    axis: str,
    given: float | None,
    points: Points,
    fewer: Points | None,
    sizes: int,
    draws: int,
    seed: int,
) -> Fit:
    law = points.fit(given)
    around = spread(points, law, given, draws=draws, seed=seed)
    checks = (
        *extent(sizes, points.x),
        correlation(points, law),
        curvature(points, law, given, around),
        residuals(points, law, around),
        prediction(fewer, float(points.x[-1]), float(points.loss[-1]), given, draws=draws, seed=seed),
    )
    return Fit(name, axis, given, points, law, around, checks)


def _notes(runs: Runs, compute: bool, before_anneal: float | None) -> list[str]:
    notes = []
    for name in ("tokens", "images"):
        if runs.has(name):
            lengths = {rung.size: rung.runs[0].last(name) for rung in runs.rungs()}
            low, high = min(lengths.values()), max(lengths.values())
            if high > 1.01 * low:
                notes.append(
                    f"sizes were trained on {low:.3g} to {high:.3g} {name}: the law against N mixes both"
                )
            break
    if compute and before_anneal is None:
        notes.append(
            "points of curves are not annealed, as results are: a budget that a curve only passes is reached with a "
            "lower loss by a training that ends there, and the frontier lies above what can be had"
        )
    if compute and before_anneal is not None:
        notes.append(f"the frontier is of the first {before_anneal:g} of each run's FLOP, before any anneal")
    if runs.ignored:
        notes.append(f"columns left aside: {', '.join(map(repr, runs.ignored))}")
    return notes


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
