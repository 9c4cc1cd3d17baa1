"""Scaling laws of anyone's runs: read from a table, fitted, and put to tests that are harder to please than a plot."""

from var_ext.scaling.checks import Check
from var_ext.scaling.frontier import Curves, IsoFlops, isoflops, read_curves
from var_ext.scaling.intervals import Noise, Points, Spread, run_noise, spread
from var_ext.scaling.laws import PAPER, Law, fit_law
from var_ext.scaling.page import as_markdown, write_page
from var_ext.scaling.plan import Plan, plan_budget
from var_ext.scaling.runs import Run, Rung, Runs, read_runs
from var_ext.scaling.study import Fit, Study, fit_runs

__all__ = [
    "PAPER",
    "Check",
    "Curves",
    "Fit",
    "IsoFlops",
    "Law",
    "Noise",
    "Plan",
    "Points",
    "Run",
    "Rung",
    "Runs",
    "Spread",
    "Study",
    "as_markdown",
    "fit_law",
    "fit_runs",
    "isoflops",
    "plan_budget",
    "read_curves",
    "read_runs",
    "run_noise",
    "spread",
    "write_page",
]
