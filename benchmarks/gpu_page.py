"""The GPU part of RESULTS.md, from the files that `make gpu` wrote to benchmarks/results.

python benchmarks/gpu_page.py                       # rewrites that part of benchmarks/RESULTS.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from gpu_predictions import PREDICTIONS  # noqa: E402
from gpu_steps import SHARES  # noqa: E402
from tables import duration, markdown  # noqa: E402

TITLE = "# On GPUs"
NONE = """No result yet: `make gpu` on a machine with a GPU writes one to `benchmarks/results/`. The speed of the
ops on a GPU has not been measured."""
HEAD = """`make gpu` writes a file to `benchmarks/results/` for each chip and commit; here is the newest of each chip. A
time is that of the GPU alone, from a replayed CUDA graph, if the calls can be captured; otherwise (*) that of
one of many calls from Python. "of ceiling" is the time that the op's minimum bytes and FLOPs would take at the
copy and product rates of the same run, divided by the time taken; "on an H100" is that time at 3.0 TB/s, 800
TFLOP/s in 16 bits and 60 in fp32. Competitors that compile were timed separately, after the others."""
PARTS = ("transformer", "draw", "step", "decoder")
PREDICTED = "Predicted for an H100 before the first run on any GPU; **missed**: off by more than a third."


def newest(folder: Path) -> list[dict[str, Any]]:
    """The last result of each chip."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    latest: dict[str, dict[str, Any]] = {}
    for report in sorted(reports, key=lambda report: report["about"]["date"]):
        latest[report["about"]["chip"]] = report
    return list(latest.values())


def step(report: Mapping[str, Any], name: str) -> str:
    """The outcome of a step, in words."""
    result = report.get(name)
    if not result:
        return "**not run**"
    counts = f": {result['ran']} tests, {len(result['skipped'])} skipped" if "ran" in result else ""
    if "kernels" in result:
        planned = sum("wrong" not in row for row in result["kernels"])
        counts = f": {planned} of {len(result['kernels'])} kernels hold the blocks that were planned"
    found = f": {result['summary']}" if result.get("summary") else ""
    if places := result.get("places"):
        found += f", in {', '.join(f'`{name}`' for name in list(places)[:5])}"
    if result["ok"]:
        return f"passed in {result['seconds']:.0f} s{counts}{found}"
    failures = "".join(f"; {name}" for name in list(result.get("failed", []))[:5])
    return f"**failed** ({result['status']}){counts}{found}{failures}"


def facts(report: Mapping[str, Any]) -> str:
    about = report["about"]
    changed = {True: " with uncommitted changes", False: "", None: ", changes unknown"}[about["dirty"]]
    ceilings = report.get("op_times", {}).get("ceilings", {})
    rates = ", ".join(
        f"{rate / 1e12:.2f} TB/s copied" if name == "copy" else f"{rate / 1e12:.0f} TFLOP/s {name}"
        for name, rate in ceilings.items()
    )
    rows = [
        ["date", about["date"][:10]],
        [
            "versions",
            f"driver {about['driver']}, CUDA {about['cuda']}, nvcc {about['nvcc']}, torch {about['torch']}",
        ],
        ["commit", f"`{(about['commit'] or 'unknown')[:12]}`{changed}; kernels {about['sources']}"],
        ["ceilings", rates or "not measured"],
        *([name, step(report, name)] for name in SHARES),
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in rows)])


def predictions(report: Mapping[str, Any]) -> str:
    """Predictions next to measurements."""
    rows = []
    for prediction in PREDICTIONS:
        figure, ratio = prediction.measured(report), prediction.ratio(report)
        shown = "not measured" if figure is None else f"{figure:.3g} {prediction.unit}"
        missed = " **missed**" if prediction.missed(report) else ""
        span = f"{prediction.least:g} to {prediction.most:g} {prediction.unit}"
        rows.append([prediction.what, span, shown, "" if ratio is None else f"{ratio:.2f}{missed}"])
    return f"{PREDICTED}\n\n" + markdown(["", "predicted", "measured", "measured / middle"], rows)


def sampling(result: Mapping[str, Any]) -> list[str]:
    """Sampling times, and the kernels that take most of them."""
    lines = []
    for row in result["rows"]:
        name = f"{row['who']}, batch {row['batch']}"
        if row["error"]:
            lines.append([name, row["error"], *[""] * 9])
            continue
        seconds, parts = median(row["seconds"]), row["parts"]
        split = [duration(sum(parts[part])) if part in parts else "" for part in PARTS]
        limit = row.get("limit_ms")
        inside = [duration(sum(map(sum, parts.values()))), duration(row["host"]) if "host" in row else ""]
        shown = [duration(seconds), duration(seconds / row["batch"]), *inside, *split]
        shown += [f"{limit} ms" if limit else "", f"{limit / seconds / 1e3:.0%}" if limit else ""]
        lines.append([name, *shown, f"{row['memory']['peak'] / 1e9:.2f} GB"])
    columns = ["", "a call", "an image", "on the GPU", "until it returns", *PARTS]
    columns += ["on an H100", "of that", "peak memory"]
    said = [markdown(columns, lines)] if lines else []
    for profile in result["profiles"]:
        kernels = [
            [f"`{row['name']}`", str(row["calls"]), duration(row["seconds"])] for row in profile["kernels"]
        ]
        said.append(
            f"Kernels at batch {profile['batch']}: {profile['launches']}, {duration(profile['busy'])} of "
            f"{duration(profile['seconds'])}; those of var_ext {duration(profile['ours'])}. The longest:"
        )
        said.append(markdown(["kernel", "calls", "in all"], kernels))
    return [f"### Sampling, d{result['depth']}, {result['precision']}, 256 px", *said]


def not_timed(result: Mapping[str, Any]) -> list[str]:
    """What a timing step left out, and why."""
    missing = {**result.get("left_out", {}), **result.get("failed", {})}
    return (
        ["Left out:\n\n" + "\n".join(f"- {name}: {why}" for name, why in missing.items())] if missing else []
    )


def cell(figures: Mapping[str, Any] | None) -> str:
    if figures is None or "error" in figures:
        return ""
    if figures["graph_us"] is None:
        return f"{duration(figures['call_us'] / 1e6)} *"
    return duration(figures["graph_us"] / 1e6)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of one op."""
    names = list(dict.fromkeys(name for row in rows for name in row["competitors"]))
    lines = []
    for row in rows:
        mine = row["competitors"].get("var_ext", {"error": "not timed"})
        shown = [row["shape"], *(cell(row["competitors"].get(name)) for name in names)]
        if "error" in mine:
            lines.append([*shown, "", "", "", "", "failed"])
            continue
        times = {
            name: figures["graph_us"] or figures["call_us"]
            for name, figures in row["competitors"].items()
            if "error" not in figures
        }
        best = min((time for name, time in times.items() if name != "var_ext"), default=None)
        lines.append(
            [
                *shown,
                f"{best / times['var_ext']:.2f}" if best else "",
                f"{mine['gbps']:.0f}",
                f"{mine['tflops']:.1f}" if row["flops"] else "",
                duration(row["roofline_us"] / 1e6),
                f"{mine['of_ceiling']:.0%}",
            ]
        )
    return markdown(["shape", *names, "x best", "GB/s", "TFLOP/s", "on an H100", "of ceiling"], lines)


def section(folder: Path = HERE / "results") -> str:
    """The whole part, including its title."""
    reports = newest(folder)
    if not reports:
        return f"{TITLE}\n\n{NONE}\n\n{predictions({})}\n"
    parts = [TITLE, HEAD]
    for report in reports:
        parts += [f"## {report['about']['chip']}", facts(report), predictions(report)]
        if report.get("sampling", {}).get("rows"):
            parts += sampling(report["sampling"])
        parts += not_timed(report.get("sampling", {}))
        op_times = report.get("op_times", {})
        rows = op_times.get("rows", [])
        for op in dict.fromkeys(row["op"] for row in rows):
            mine = [row for row in rows if row["op"] == op]
            kernel = "" if mine[0]["kernel"] == "native" else "No CUDA kernel: plain PyTorch.\n\n"
            parts.append(f"### {op}\n\n{kernel}{table(mine)}")
        parts += not_timed(op_times)
    return "\n\n".join(parts) + "\n"


def without(page: str) -> str:
    """A page up to its GPU part."""
    return page.partition(f"\n{TITLE}\n")[0].rstrip("\n") + "\n"


def main() -> None:
    page = HERE / "RESULTS.md"
    page.write_text(f"{without(page.read_text(encoding='utf-8'))}\n{section()}", encoding="utf-8")
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
