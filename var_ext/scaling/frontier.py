"""Loss against compute: curves of all sizes at common budgets, their Pareto frontier, and isoFLOP parabolas."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from var_ext.scaling.intervals import Noise, Points
from var_ext.scaling.laws import Array
from var_ext.scaling.runs import Runs

A_DECADE = 8  # budgets at which curves are read
SAME = 1e-9  # relative: budgets that are equal but for rounding
ISO_SIZES = 4  # a parabola through three sizes would fit anything


@dataclass(frozen=True)
class Curves:
    """Mean curves over seeds at common budgets.

    budgets: (G,) FLOP, rising. loss: (R, G) float64, a row a rung, NaN where its runs have no points on both sides of
    the budget. sizes, seeds, error: (R,) parameters, number of runs, standard error over validation subsets.
    """

    budgets: Array
    loss: Array
    sizes: Array
    seeds: Array
    error: Array

    def without_largest(self) -> Curves:
        """The same budgets without the runs of the largest size."""
        keep = self.sizes < self.sizes.max()
        return Curves(self.budgets, self.loss[keep], self.sizes[keep], self.seeds[keep], self.error[keep])

    @property
    def crossing(self) -> bool:
        """Whether sizes can be compared: some budget is reached by several."""
        return bool(((~np.isnan(self.loss)).sum(0) > 1).any())

    def frontier(self, noise: Noise) -> Points:
        """The lowest loss at each budget, where no smaller budget reached it: points share the noise of their rung.

        Where curves cross, budgets at which the smallest or the largest size is best are left out: one outside of the
        ladder might be better there, and what is seen is the course of a training.
        """
        best = self.best(self.loss)
        lowest = np.where(np.isnan(self.loss).all(0), np.inf, self.loss[best, np.arange(len(self.budgets))])
        before = np.minimum.accumulate(np.concatenate(([np.inf], lowest)))[:-1]
        inner = (self.sizes[best] > self.sizes.min()) & (self.sizes[best] < self.sizes.max())
        on = np.flatnonzero((lowest < before) & (inner | (not self.crossing)))
        return Points(self.budgets[on], lowest[on], best[on], self.seeds, self.error, noise)

    def between(self, budgets: Array) -> np.ndarray:
        """Where (K,) budgets are reached by smaller and by larger sizes than the best one: (K,) bool.

        Elsewhere the best size says how long the sizes were trained, not which one is best for the budget.
        """
        at = np.isin(self.budgets, budgets)
        best = self.sizes[self.best(self.loss[:, at])]
        reach = np.where(np.isnan(self.loss[:, at]), np.nan, self.sizes[:, None])
        return np.asarray((best > np.nanmin(reach, 0)) & (best < np.nanmax(reach, 0)))

    @staticmethod
    def best(loss: Array) -> np.ndarray:
        """Rungs of the lowest loss at each budget: (..., R, G) -> (..., G)."""
        return np.asarray(np.where(np.isnan(loss), np.inf, loss).argmin(-2))


def read_curves(runs: Runs, name: str, before_anneal: float | None = None) -> Curves:
    """The curves of a loss at 8 budgets a decade, by lines in log L over log C, as Chinchilla's first approach.

    Args:
        runs: with FLOP. Where every run is a result alone, budgets are theirs.
        name: the loss.
        before_anneal: only points in this first share of a run's FLOP, such as .8 where the rest anneals.

    Raises:
        ValueError: no FLOP, or no points before the anneal.
    """
    if not runs.has("flops"):
        raise ValueError(
            "no law against compute: the table has no FLOP; name a column flops, or choose one with "
            "--column flops=HEADER (FLOP of the whole training up to the row, counted, not 6 N D)"
        )
    rungs = runs.rungs()
    curves = [
        [_curve(run.values["flops"], run.values[name], before_anneal) for run in rung.runs] for rung in rungs
    ]
    if not any(len(c) for members in curves for c, _ in members):
        raise ValueError(f"no points of curves lie in the first {before_anneal:g} of their run's FLOP")
    ends = [(c[0], c[-1]) for members in curves for c, _ in members if len(c)]
    low, high = min(first for first, _ in ends), max(last for _, last in ends)
    if all(first == last for first, last in ends):
        budgets = np.unique([last for _, last in ends])
    else:
        budgets = np.geomspace(low, high, int(np.ceil(A_DECADE * np.log10(high / low))) + 1)
    loss = np.array([np.mean([_at(budgets, *curve) for curve in members], 0) for members in curves])
    return Curves(
        budgets,
        loss,
        np.array([rung.size for rung in rungs]),
        np.array([float(len(rung.runs)) for rung in rungs]),
        np.array([rung.mean(f"{name}_se") for rung in rungs]),
    )


def _curve(flops: Array, loss: Array, share: float | None) -> tuple[Array, Array]:
    keep = np.ones(len(flops), bool) if share is None else flops <= share * flops[-1]
    return flops[keep], loss[keep]


def _at(budgets: Array, flops: Array, loss: Array) -> Array:
    if not len(flops):
        return np.full(len(budgets), np.nan)
    inside = (budgets >= flops[0] * (1 - SAME)) & (budgets <= flops[-1] * (1 + SAME))
    return np.where(inside, np.exp(np.interp(np.log(budgets), np.log(flops), np.log(loss))), np.nan)


@dataclass(frozen=True)
class IsoFlops:
    """Best sizes at fixed budgets: budgets (K,) FLOP, sizes (K,) parameters; refused: why there are none, or empty."""

    budgets: Array
    sizes: Array
    refused: str = ""

    def exponent(self) -> float:
        """a of N = k C^a."""
        return float(np.polyfit(np.log(self.budgets), np.log(self.sizes), 1)[0])


def isoflops(curves: Curves) -> IsoFlops:
    """A parabola of the loss in log N at each budget (arXiv 2203.15556, section 3.2), where its lowest point is seen.

    Seen is one with smaller and larger sizes that reach the budget too; the parabola goes through it and the two next
    to it on both sides, at least four. A law of the best size needs three such budgets.
    """
    found, why = [], Counter[str]()
    for g, budget in enumerate(curves.budgets):
        n, loss = _by_size(curves, g, curves.loss[None, :, g])
        lowest = int(loss.argmin()) if len(n) else 0
        if len(n) < ISO_SIZES:
            why[f"fewer than {ISO_SIZES} sizes reach them"] += 1
        elif lowest in (0, len(n) - 1):
            why[f"the {'largest' if lowest else 'smallest'} of the sizes that reach them is best"] += 1
        else:
            found.append((float(budget), float(_vertex(n, loss, lowest)[0])))
    reasons = ", ".join(f"at {count} {reason}" for reason, count in why.most_common())
    refused = "" if len(found) >= 3 else (
        f"isoFLOP curves show a best size at {len(found)} of {len(curves.budgets)} budgets and need 3: {reasons}; "
        "train more sizes that reach the same FLOP, some too small and some too large for it"
    )  # fmt: skip
    pairs = np.array(found).reshape(-1, 2)
    return IsoFlops(pairs[:, 0], pairs[:, 1], refused)


def _by_size(curves: Curves, g: int, loss: Array) -> tuple[Array, Array]:
    """Sizes (n,) that reach budget g, rising, and the lowest loss of each: (D, R) -> (D, n)."""
    there = ~np.isnan(curves.loss[:, g])
    n = np.unique(curves.sizes[there])
    lowest = [loss[:, (curves.sizes == size) & there].min(1) for size in n]
    return n, np.stack(lowest, 1) if lowest else np.empty((len(loss), 0))


def _vertex(n: Array, loss: Array, lowest: int) -> Array:
    """Lowest points of parabolas in log N around one size: (D, n) -> (D,) parameters, of those that they go through."""
    near = slice(max(lowest - 2, 0), lowest + 3)
    z = np.log(n / n[lowest])[near]
    a, b, _ = np.polyfit(z, loss[:, near].T, 2)
    best = np.where(a > 0, -b / (2 * np.maximum(a, 1e-300)), z[loss[:, near].argmin(1)])
    return np.asarray(n[lowest] * np.exp(np.clip(best, z[0], z[-1])))


def drawn_vertices(curves: Curves, iso: IsoFlops, errors: Array) -> Array:
    """Best sizes (D, K) at the budgets of parabolas, for errors (D, R) of the rungs."""
    columns = []
    for g in map(int, np.flatnonzero(np.isin(curves.budgets, iso.budgets))):
        _, found = _by_size(curves, g, curves.loss[None, :, g])
        columns.append(_vertex(*_by_size(curves, g, curves.loss[:, g] + errors), int(found.argmin())))
    return np.stack(columns, 1)


def drawn_best(curves: Curves, budgets: Array, errors: Array, rng: np.random.Generator) -> Array:
    """Best sizes (D, K) on the frontier at some of its budgets, for errors (D, R) of the rungs.

    A size stands for all that are nearer to it than to its neighbours in the ladder, so each draw moves it among those.
    """
    n = np.unique(curves.sizes)
    edges = np.log(np.concatenate((n[:1], np.sqrt(n[1:] * n[:-1]), n[-1:])))
    moved = np.exp(edges[:-1] + rng.random((len(errors), len(n))) * np.diff(edges))
    at = np.isin(curves.budgets, budgets)
    best = curves.sizes[curves.best(curves.loss[:, at] + errors[:, :, None])]
    return np.take_along_axis(moved, np.searchsorted(n, best), 1)
