"""Renders RESULTS.md from the JSON of pytest-benchmark.

python benchmarks/render.py benchmarks/latest.json          # writes benchmarks/RESULTS.md beside it
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_page
import versus_page
from tables import duration, markdown

COPY, PRODUCT = "copy of 256 MiB", "{} product of 2048 x 2048"
PRODUCTS = tuple(PRODUCT.format(dtype) for dtype in ("fp32", "bf16"))
END_TO_END = {
    "input": "pictures of 110 KB read, resized and cut to 256 px",
    "sampling": "pictures of the bundled model drawn",
    "training": "pictures of the bundled model's recipes learned from",
}
HEAD = """# Benchmarks

Written by `{command}` from `benchmarks/bench_NAME.py`, one file per op. The competitors of a shape run on the
same inputs in the same process: each is checked against the reference, then they alternate in laps, and a
figure is the median over laps of each lap's median. On the CPU, in fp32 unless another dtype is named.

| | |
| --- | --- |
{facts}

"reference" is the plain PyTorch of `var_ext/reference`. `var_ext` is the public op: its native
kernel where stated, otherwise the reference behind checks and dispatch. "x reference" is how many times faster
`var_ext` is than the reference, "x best" than the fastest of all others. GB/s and GFLOP/s count the
minimum that the op must move and compute; "of limit" is the time this would take at the copy and product rates
above, divided by the time taken. It may exceed 100%, because small inputs stay in caches that are faster than
the copy.
"""

KERNEL = {
    "native": "Native kernel.",
    "reference": "No kernel of its own yet: plain PyTorch, on native search and interpolation where it has them.",
}


class Results:
    """The figures of one run: op -> shape -> competitor -> seconds."""

    def __init__(self, report: dict[str, Any]) -> None:
        laps: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        self.info: dict[tuple[str, str], dict[str, Any]] = {}
        for entry in report["benchmarks"]:
            extra = entry["extra_info"]
            laps[extra["op"], extra["shape"], extra["competitor"]].append(entry["stats"]["median"])
            self.info[extra["op"], extra["shape"]] = extra
        self.seconds: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
        for (op, shape, competitor), times in laps.items():
            self.seconds[op][shape][competitor] = median(times)
        self.spreads = [(max(times) - min(times)) / median(times) for times in laps.values()]
        limits = self.seconds.pop("limits", {})
        if missing := {COPY, *PRODUCTS} - set(limits):
            raise SystemExit(
                f"the run must include bench_limits.py, got no {' and no '.join(sorted(missing))}"
            )
        self.bandwidth = self.info["limits", COPY]["bytes"] / limits[COPY]["torch"]
        self.peaks = [self.info["limits", p]["flops"] / limits[p]["torch"] for p in PRODUCTS]  # fp32, bf16
        self.threads = self.seconds.pop("threads", {})

    def table(self, op: str) -> str:
        """One row a shape."""
        shapes = self.seconds[op]
        competitors = list(next(iter(shapes.values())))
        columns = ["shape", *competitors, "x reference", "x best", "GB/s", "GFLOP/s", "of limit"]
        rows = []
        for shape, times in shapes.items():
            info, mine = self.info[op, shape], times["var_ext"]
            others = [t for name, t in times.items() if name != "var_ext"]
            peak = self.peaks["bf16" in shape]
            least = max(info["bytes"] / self.bandwidth, info["flops"] / peak)
            rows.append(
                [
                    shape,
                    *(duration(times[name]) if name in times else "" for name in competitors),
                    f"{times['reference'] / mine:.2f}",
                    f"{min(others) / mine:.2f}",
                    f"{info['bytes'] / mine / 1e9:.2f}",
                    f"{info['flops'] / mine / 1e9:.1f}" if info["flops"] else "",
                    f"{least / mine:.0%}",
                ]
            )
        return markdown(columns, rows)

    def end_to_end(self, name: str) -> str:
        """Images per second, one row per shape."""
        rows = []
        for shape, times in self.seconds[name].items():
            images = self.info[name, shape]["images"]
            speeds = {competitor: images / t for competitor, t in times.items()}
            ratio = f"{speeds['var_ext'] / speeds['reference']:.2f}"
            rows.append(
                [shape, *(f"{speed:.1f}" for speed in speeds.values()), duration(times["var_ext"]), ratio]
            )
        return markdown(["", "var_ext, images/s", "reference, images/s", "a call", "x reference"], rows)


def facts(report: dict[str, Any], results: Results) -> str:
    """What was measured, on which machine, with which versions."""
    machine, commit = report["machine_info"], report["commit_info"]
    build, chip = machine["var_ext"], machine["cpu"]
    changed = " with uncommitted changes" if commit.get("dirty") else ""
    tenths = quantiles(results.spreads, n=10)
    lines = {
        "machine": f"{chip.get('brand_raw', machine['machine'])}, {chip['count']} cores, {machine['system']}",
        "date": report["datetime"][:10],
        "versions": f"var_ext {build['version']} ({build['compiler']}, {build['isa']}), "
        f"torch {machine['torch']}, Python {machine['python_version']}",
        "threads": f"{machine['threads']}",
        "commit": f"`{commit['id'][:12]}`{changed}" if commit.get("id") else "none yet",
        "copy": f"{results.bandwidth / 1e9:.1f} GB/s, read and written ({COPY}, measured in this run)",
        "product": " and ".join(
            f"{peak / 1e9:.0f} GFLOP/s ({name})" for peak, name in zip(results.peaks, PRODUCTS, strict=True)
        )
        + ", measured in this run",
        "one pool of threads": "; ".join(
            f"{shape}: {duration(times['in turns'])} in turns, {duration(times['apart'])} apart"
            for shape, times in results.threads.items()
        )
        or "not measured",
        "load": f"{machine['load']:.1f} processes in the minute before"
        + (" (**busy: do not trust these figures**)" if machine["load"] > chip["count"] / 2 else ""),
        "noise": f"laps differ by up to {tenths[4]:.0%} in half of the figures, {tenths[8]:.0%} in 9 of 10",
    }
    return "\n".join(f"| {name} | {text} |" for name, text in lines.items())


def render(report: dict[str, Any], command: str = "make bench") -> str:
    """The whole page."""
    results = Results(report)
    parts = [HEAD.format(command=command, facts=facts(report, results))]
    for name, title in END_TO_END.items():
        if name in results.seconds:
            parts.append(f"## End to end: {title}\n\n{results.end_to_end(name)}\n")
    for op in sorted(set(results.seconds) - set(END_TO_END)):
        kernel = next(info["kernel"] for (name, _), info in results.info.items() if name == op)
        parts.append(f"## {op}\n\n{KERNEL[kernel]}\n\n{results.table(op)}\n")
    return "\n".join([*parts, versus_page.section(), gpu_page.section()])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "RESULTS.md")
    arguments = parser.parse_args()
    page = render(json.loads(arguments.report.read_text(encoding="utf-8")))
    arguments.out.write_text(page, encoding="utf-8")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
