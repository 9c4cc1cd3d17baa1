"""Plots of laws, as PNG files; they need matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np

from var_ext.scaling.frontier import Curves
from var_ext.scaling.laws import UNITS
from var_ext.scaling.study import Fit

ALONE = ("loss_avg", "loss_last", "err_avg", "err_last")  # in a panel


def plot_laws(fits: Sequence[Fit], curves: Mapping[str, Curves]) -> bytes:
    """A panel a loss: points, the law with a free E and its 90% interval; curves behind, where there are any.

    Scales share the last panel.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and looks for a display

    free = [fit for fit in fits if fit.irreducible is None]
    panels: list[list[Fit]] = [[fit] for fit in free if fit.name in ALONE]
    if scales := [fit for fit in free if fit.name not in ALONE]:
        panels.append(scales)
    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    factor, unit = UNITS[fits[0].axis]
    for axis, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for number, fit in enumerate(panel):
            if len(panel) == 1 and fit.name in curves:
                for row in curves[fit.name].loss:
                    axis.plot(curves[fit.name].budgets / factor, row, color="0.8", linewidth=1)
            x = np.geomspace(fit.points.x[0], 2 * fit.points.x[-1], 100)
            said, span = fit.predict(x)
            color = f"C{number % 10}"
            axis.plot(fit.points.x / factor, fit.points.loss, "o", color=color, markersize=4, label=fit.name)
            axis.plot(
                x / factor, said, color=color, linewidth=1, linestyle="-" if fit.verdict == "holds" else ":"
            )
            if span is not None:
                axis.fill_between(x / factor, span[:, 0], span[:, 1], color=color, alpha=0.2, linewidth=0)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.set_xlabel(unit)
        only = panel[0]
        axis.set_title(f"{only.name}: {only.verdict}" if len(panel) == 1 else "scales", fontsize="medium")
        axis.legend(fontsize="x-small")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=80)
    return out.getvalue()
