"""Which size, and how long a training, for a budget of FLOP."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from var_ext.scaling.frontier import drawn_best, drawn_vertices
from var_ext.scaling.intervals import Spread, run_noise
from var_ext.scaling.laws import Array
from var_ext.scaling.runs import Runs
from var_ext.scaling.study import Fit, Study

Interval = tuple[float, float]


@dataclass(frozen=True)
class Plan:
    """What to train with `flops`; every figure with its 90% interval, (x, x) where the noise of runs is not known.

    size: parameters. length: tokens and images, those that the table counts. loss: by `fit`, the law against compute.
    outside: by how many times the budget exceeds those that were run; below 1 by how many it falls short; else 1.
    """

    flops: float
    name: str
    source: str
    size: tuple[float, Interval]
    length: dict[str, tuple[float, Interval]]
    loss: tuple[float, Interval]
    fit: Fit
    outside: float
    known: bool

    def as_text(self) -> str:
        """Lines to read."""

        def line(name: str, value: float, interval: Interval) -> str:
            span = f"  (90%: {interval[0]:.4g} to {interval[1]:.4g})" if self.known else ""
            return f"  {name:<10} {value:.4g}{span}"

        lines = [
            f"{self.flops:.3g} FLOP, by {self.source}:",
            line("parameters", *self.size),
            *(line(name, *pair) for name, pair in self.length.items()),
            line(self.name, *self.loss) + f"  by the law against compute; verdict on it: {self.fit.verdict}",
        ]
        if not self.known:
            lines.append("no intervals: the table has neither seeds nor standard errors")
        if self.outside != 1:
            times = self.outside if self.outside > 1 else 1 / self.outside
            side = "above" if self.outside > 1 else "below"
            lines.append(
                f"warning: {times:.3g} times {side} the budgets that this rests on; nothing there was tested"
            )
        return "\n".join(lines)


def plan_budget(
    runs: Runs, study: Study, flops: float, name: str, *, draws: int = 1000, seed: int = 0
) -> Plan:
    """The size that reaches the lowest loss with a budget, and how long it is trained.

    Best sizes come from isoFLOP parabolas (Chinchilla, arXiv 2203.15556, section 3.2) or, where they show none, from
    the sizes on the Pareto frontier (its section 3.1); a line through them in log N over log C leads to the budget.
    The length is what the budget leaves at that size, by the FLOP of a token (or image) that the runs spent.

    Args:
        runs, study: of `read_runs` and `fit_runs`.
        flops: the budget.
        name: the loss that is to be low.
        draws, seed: of the bootstrap over the noise of runs.

    Raises:
        ValueError: a budget that is not positive, a loss or FLOP that the table lacks, tokens and images lacking both,
            or fewer than two sizes that are best at a budget which smaller and larger ones reach.
    """
    if not flops > 0 or not np.isfinite(flops):
        raise ValueError(f"a budget must be a positive number of FLOP, got {flops:g}")
    wanted = (
        fit for fit in study.fits if fit.axis == "flops" and fit.name == name and fit.irreducible is None
    )
    fit = next(wanted, None)
    if fit is None:
        reasons = (study.lacking.get(key) for key in ("flops", f"{name} against flops", name))
        raise ValueError(next(filter(None, reasons), f"no loss {name}: there are {', '.join(runs.losses)}"))
    counted = [unit for unit in ("tokens", "images") if runs.has(unit)]
    if not counted:
        raise ValueError("a plan needs how long runs were trained: name a column tokens or images")
    curves, iso = study.curves[name], study.best_sizes[name]
    if not curves.crossing:
        raise ValueError(
            "every budget was reached by one size alone, so none is known to be better there: add points of the "
            "curves, a row each with its flops"
        )
    if iso.refused:
        between = curves.between(fit.points.x)
        budgets, sizes = fit.points.x[between], curves.sizes[fit.points.group][between]
        source = f"the sizes on the frontier ({iso.refused})"
        if len(set(sizes)) < 2:
            raise ValueError(
                f"the best size is known for {len(set(sizes))} sizes and 2 are needed: at {(~between).sum()} of "
                f"{len(between)} budgets on the frontier it is the smallest or the largest that reaches them; train "
                "the small ones longer, so that they reach the budgets of the larger"
            )
    else:
        budgets, sizes = iso.budgets, iso.sizes
        source = f"{len(budgets)} isoFLOP curves, N ~ C^{iso.exponent():.2f}"
    noise, best = run_noise(runs.rungs(), name), _line(budgets, sizes[None], flops)
    drawn = best
    if noise.known:
        rng = np.random.default_rng(seed)
        errors = noise.errors(rng, draws, curves.seeds, curves.error)
        by_frontier, by_parabola = (curves, budgets, errors, rng), (curves, iso, errors)
        drawn = drawn_best(*by_frontier) if iso.refused else drawn_vertices(*by_parabola)
        drawn = _line(budgets, drawn, flops)
    (loss,), around = fit.predict(flops)
    low, high = float(budgets.min()), float(budgets.max())
    return Plan(
        flops,
        name,
        source,
        (float(best[0]), Spread.interval(drawn)),
        {unit: _length(runs, unit, flops, best, drawn) for unit in counted},
        (
            float(loss),
            (float(loss), float(loss)) if around is None else (float(around[0, 0]), float(around[0, 1])),
        ),
        fit,
        flops / high if flops > high else flops / low if flops < low else 1.0,
        noise.known,
    )


def _line(budgets: Array, sizes: Array, flops: float) -> Array:
    """Sizes (D, K) at budgets (K,) followed by a line in logarithms to another budget: (D,)."""
    slope, level = np.polyfit(np.log(budgets), np.log(sizes).T, 1)
    return np.asarray(np.exp(slope * np.log(flops) + level))


def _length(runs: Runs, unit: str, flops: float, best: Array, drawn: Array) -> tuple[float, Interval]:
    """How many tokens or images the budget pays for."""
    longest = {rung.size: rung.runs[0] for rung in runs.rungs()}
    n = np.log(list(longest))
    price = np.log([run.last("flops") / run.last(unit) for run in longest.values()])

    def paid(size: Array) -> Array:
        z = np.log(size)
        k = np.clip(np.searchsorted(n, z) - 1, 0, len(n) - 2)  # the piece of the line; the outer ones go on
        slope = (price[k + 1] - price[k]) / (n[k + 1] - n[k])
        return np.asarray(flops / np.exp(price[k] + slope * (z - n[k])))

    return float(paid(best)[0]), Spread.interval(paid(drawn))
