"""The part of RESULTS.md on single ops and on the bundled model, from the files of time_ops.py in results/ops.

python benchmarks/ops_page.py                       # writes that part of benchmarks/RESULTS.md anew
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import quantiles
from typing import Any

from harness.report import FOLDER, Report, load
from harness.results_page import duration, listing, markdown, provenance, rewrite

TITLE = "# Benchmarks"
END_TO_END = {
    "sampling": "pictures of the bundled model drawn",
    "input": "pictures of 110 KB read, resized and cut to 256 px",
    "training": "pictures of the bundled model's recipes learned from",
}
HEAD = """Written by `make bench` from `benchmarks/bench_NAME.py`, one file per op. The competitors of a shape run on
the same inputs in the same process: each is checked against the reference, then they alternate in laps, and a
figure is the median over laps of each lap's median. On the CPU, in fp32 unless another dtype is named. Each op's
figures are those of the last run that timed it.

"reference" is the plain PyTorch of `var_ext/reference`. `var_ext` is the public op: its native
kernel where stated, otherwise the reference behind checks and dispatch. "x reference" is how many times faster
`var_ext` is than the reference, "x best" than the fastest of all others. GB/s and GFLOP/s count the
minimum that the op must move and compute; "of limit" is the time this would take at the copy and product rates
of the same run, divided by the time taken. It may exceed 100%, because small inputs stay in caches that are faster
than the copy."""
KERNEL = {
    "native": "Native kernel",
    "reference": "No kernel of its own yet: plain PyTorch, on native search and interpolation where it has them",
}
Row = Mapping[str, Any]


def runs(folder: Path) -> list[tuple[Report, dict[str, list[Row]]]]:
    """Runs, newest first, each with its rows of the ops that no later run on this chip timed."""
    reports = sorted(
        map(load, folder.glob("*.json")), key=lambda report: report["about"]["date"], reverse=True
    )
    taken: set[tuple[str, str]] = set()
    found = []
    for report in reports:
        chip, rows = report["about"]["chip"], report["rows"]
        ops = {op: [row for row in rows if row["op"] == op] for op in sorted({row["op"] for row in rows})}
        ops = {op: mine for op, mine in ops.items() if (chip, op) not in taken}
        taken |= {(chip, op) for op in ops}
        found += [(report, ops)] if ops else []
    return found


def took(figures: Row | None) -> float | None:
    """Seconds of a call: the GPU's time alone, where it could be taken by itself."""
    if figures is None or "error" in figures:
        return None
    return (figures["graph_us"] or figures["call_us"]) / 1e6


def table(rows: Iterable[Row], *, gpu: bool = False) -> str:
    """A row a shape: seconds of each competitor, and how var_ext stands beside them and the limits.

    Args:
        gpu: FLOPs in TFLOP/s, with the plan for an H100; "*" marks times that hold launches from Python.
    """
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row["competitors"]))
    lines = []
    for row in rows:
        times = {name: took(row["competitors"].get(name)) for name in names}
        stars = {
            name: " *" if gpu and times[name] and not row["competitors"][name]["graph_us"] else ""
            for name in names
        }
        shown = [row["shape"], *(duration(t) + stars[name] if t else "" for name, t in times.items())]
        mine, figures = times.pop("var_ext", None), row["competitors"].get("var_ext", {})
        if not mine:
            lines.append([*shown, "", "", "", "", *([""] if gpu else []), "failed"])
            continue
        others = [t for t in times.values() if t]
        rate = f"{figures['tflops']:.1f}" if gpu else f"{figures['tflops'] * 1e3:.1f}"
        lines.append(
            [
                *shown,
                f"{times['reference'] / mine:.2f}" if times.get("reference") else "",
                f"{min(others) / mine:.2f}" if others else "",
                f"{figures['gbps']:.0f}" if gpu else f"{figures['gbps']:.2f}",
                rate if row["flops"] else "",
                *([duration(row["roofline_us"] / 1e6)] if gpu else []),
                f"{figures['of_ceiling']:.0%}",
            ]
        )
    ends = ["TFLOP/s", "on an H100"] if gpu else ["GFLOP/s"]
    return markdown(["shape", *names, "x reference", "x best", "GB/s", *ends, "of limit"], lines)


def end_to_end(rows: Iterable[Row]) -> str:
    """Images per second, one row per shape."""
    lines = []
    for row in rows:
        mine, other = (took(row["competitors"][name]) or float("nan") for name in ("var_ext", "reference"))
        speeds = [f"{row['images'] / seconds:.1f}" for seconds in (mine, other)]
        lines.append([row["shape"], *speeds, duration(mine), f"{other / mine:.2f}"])
    return markdown(["", "var_ext, images/s", "reference, images/s", "a call", "x reference"], lines)


def noise(report: Report) -> str:
    """How far the laps of a figure lie apart."""
    spreads = [
        figures["spread"]
        for row in report["rows"]
        for figures in row["competitors"].values()
        if "spread" in figures
    ]
    half, most = (quantiles(spreads, n=10)[at] for at in (4, 8)) if len(spreads) > 1 else report["noise"]
    return f"laps differ by up to {half:.0%} in half of the figures, {most:.0%} in 9 of 10"


def facts(report: Report, ops: Mapping[str, list[Row]]) -> str:
    """What was measured, on which machine, with which versions, and what that can do at best."""
    rates = report["ceilings"]
    products = " and ".join(f"{rates[dtype] / 1e9:.0f} GFLOP/s in {dtype}" for dtype in ("fp32", "bf16"))
    lines = provenance(report["about"]) | {
        "copy": f"{rates['copy'] / 1e9:.1f} GB/s, read and written, of 256 MiB in this run",
        "product": f"{products}, of 2048 x 2048 in this run",
        "noise": noise(report),
    }
    for row in ops.get("threads", []):
        turns, apart = (duration(took(row["competitors"][way]) or 0) for way in ("in turns", "apart"))
        lines["one pool of threads"] = f"{row['shape']}: {turns} in turns, {apart} apart"
    lines["timed"] = ", ".join(ops)
    if "note" in report:
        lines["note"] = report["note"]
    missing = {**report.get("left_out", {}), **report.get("failed", {})}
    if missing:
        lines["left out"] = "; ".join(f"{name}: {why}" for name, why in missing.items())
    return listing(lines)


def section(folder: Path = FOLDER / "results" / "ops") -> str:
    """The whole part, including its title."""
    found = runs(folder)
    if not found:
        return f"{TITLE}\n\nNo result yet: `make bench` writes one to `benchmarks/results/ops/`.\n"
    parts = [TITLE, HEAD]
    for report, ops in found:
        about = report["about"]
        parts += [f"## On {about['chip']}, {about['date'][:10]}", facts(report, ops)]
        parts += [
            f"### End to end: {END_TO_END[op]}\n\n{end_to_end(ops[op])}" for op in END_TO_END if op in ops
        ]
        for op in sorted(ops.keys() - {*END_TO_END, "threads"}):
            parts.append(f"### {op}\n\n{KERNEL[ops[op][0]['kernel']]}.\n\n{table(ops[op])}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    rewrite(section())
