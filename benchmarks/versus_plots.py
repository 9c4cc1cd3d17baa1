"""The pictures beside the tables of versus_page.py: one an SVG, the same for the same results."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from harness.report import Report, slug
from harness.results_page import duration

PARTS = ("transformer", "head and sampling", "quantizer", "decoder")
COLORS = {
    "transformer": "#3b6ea5",
    "head and sampling": "#e0a030",
    "quantizer": "#7a9a4a",
    "decoder": "#9a5a7a",
}


def batches(report: Report) -> dict[int, list[Report]]:
    """Rows of each batch size."""
    rows: dict[int, list[Report]] = {}
    for row in report["rows"]:
        rows.setdefault(row["batch"], []).append(row)
    return rows


def plot_name(report: Report) -> str:
    return f"{report['kind']}-{slug(report['about'])}.svg"


def plot(report: Report, path: Path) -> None:
    """Draws the report's picture; the same report gives the same file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"svg.hashsalt": "var_ext", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
    with plt.rc_context({**style, "axes.spines.right": False}):
        figure = {"official": _plot_official, "dit": _plot_dit, "cost": _plot_cost}[report["kind"]](
            plt, report
        )
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _decades(axis: Any, times: list[float]) -> None:
    """A logarithmic axis of seconds from one power of ten to another."""
    axis.set_major_formatter(lambda seconds, _: duration(seconds))
    axis.set_minor_formatter("")
    low, high = (
        10 ** math.floor(math.log10(min(times) / 1.2)),
        10 ** math.ceil(math.log10(max(times) * 1.2)),
    )
    axis.axes.set(**{"xlim" if axis.axis_name == "x" else "ylim": (low, high)})


def _plot_official(plt: Any, report: Report) -> Any:
    """A bar a competitor: seconds an image, by part."""
    by_batch = batches(report)
    height = 1.1 + 0.3 * max(map(len, by_batch.values()))
    figure, axes = plt.subplots(
        1, len(by_batch), figsize=(max(6.0, 4.5 * len(by_batch)), height), squeeze=False, layout="constrained"
    )
    for axis, (batch, rows) in zip(axes[0], by_batch.items(), strict=True):
        rows = [row for row in reversed(rows) if row["seconds"]]
        for at, row in enumerate(rows):
            left, whole = 0.0, median(row["seconds"]) / batch
            for part in PARTS if set(PARTS) <= set(row["parts"]) else ():
                width = sum(row["parts"][part]) / batch
                axis.barh(at, width, left=left, color=COLORS[part], label=part if at == 0 else None)
                left += width
            axis.barh(at, max(whole - left, 0), left=left, color="#bbbbbb")
            axis.text(max(whole, left), at, f" {duration(whole)}", va="center")
        axis.set_yticks(range(len(rows)), [f"{row['who']} {row['precision']}" for row in rows])
        axis.set_title(f"batch {batch}: seconds an image", loc="left")
        axis.margins(x=0.2)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _plot_dit(plt: Any, report: Report) -> Any:
    """A bar a sampler: seconds an image, on a logarithmic axis."""
    bars = []
    for row in report["rows"]:
        name = f"{row['precision']}, batch {row['batch']}"
        if row["seconds"] and row["who"] == "DiT":
            bars += [
                (f"DiT-XL/2, {n} steps, {name}", t / row["batch"], "#999999")
                for n, t in row["of_steps"].items()
            ]
        elif row["seconds"]:
            label = f"var_ext d{report['model']['depth']}, {name}"
            bars.append((label, median(row["seconds"]) / row["batch"], COLORS["transformer"]))
    figure, axis = plt.subplots(figsize=(7, 0.9 + 0.3 * len(bars)), layout="constrained")
    for at, (_, seconds, color) in enumerate(reversed(bars)):
        axis.barh(at, seconds, color=color)
        axis.text(seconds, at, f" {duration(seconds)}", va="center")
    axis.set_yticks(range(len(bars)), [name for name, *_ in reversed(bars)])
    axis.set_xscale("log")
    _decades(axis.xaxis, [seconds for _, seconds, _ in bars])
    axis.set_title("seconds an image", loc="left")
    return figure


def _plot_cost(plt: Any, report: Report) -> Any:
    """Two panels: seconds of a call over batch, and over depth; dashed: the FLOPs at the best rate of the run."""
    rows = [row for row in report["rows"] if row["seconds"]]
    depth, first = report["model"]["depth"], min(row["batch"] for row in rows)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    panels = (
        (axes[0], "batch", f"d{depth}: seconds a call over batch", lambda row: row["depth"] == depth),
        (axes[1], "depth", f"batch {first}: seconds a call over depth", lambda row: row["batch"] == first),
    )
    for axis, x, title, chosen in panels:
        for precision in dict.fromkeys(row["precision"] for row in rows):
            mine = sorted((r for r in rows if chosen(r) and r["precision"] == precision), key=lambda r: r[x])
            work = [sum(r["flops"].values()) * r["batch"] for r in mine]
            times = [median(r["seconds"]) for r in mine]
            if not mine:
                continue
            best = max(w / t for w, t in zip(work, times, strict=True))
            at = [r[x] for r in mine]
            (line,) = axis.plot(at, times, "o-", label=precision)
            label = f"counted FLOPs at {best / 1e9:.0f} GFLOP/s"
            axis.plot(at, [w / best for w in work], "--", color=line.get_color(), alpha=0.6, label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        _decades(axis.yaxis, [median(r["seconds"]) for r in rows if chosen(r)])
        ticks = sorted({r[x] for r in rows if chosen(r)})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.set_title(title, loc="left")
        axis.legend(frameon=False)
    return figure


def draw(reports: Iterable[Report], plots: Path) -> None:
    plots.mkdir(exist_ok=True)
    for report in reports:
        if report["kind"] != "training":  # a table says it all
            plot(report, plots / plot_name(report))
