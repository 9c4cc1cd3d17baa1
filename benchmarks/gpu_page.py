"""The GPU part of RESULTS.md, from the files that `make gpu` wrote to benchmarks/results.

python benchmarks/gpu_page.py                       # rewrites that part of benchmarks/RESULTS.md
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

from gpu_predictions import PREDICTIONS
from gpu_steps import SHARES
from harness.report import FOLDER, Report, newest
from harness.results_page import duration, listing, markdown, provenance, rewrite
from ops_page import table

TITLE = "# On GPUs"
NONE = """No result yet: `make gpu` on a machine with a GPU writes one to `benchmarks/results/`. The speed of the
ops on a GPU has not been measured."""
HEAD = """`make gpu` writes a file to `benchmarks/results/` for each chip and commit; here is the newest of each chip. A
time is that of the GPU alone, from a replayed CUDA graph, if the calls can be captured; otherwise (*) that of
one of many calls from Python. "of limit" is the time that the op's minimum bytes and FLOPs would take at the
copy and product rates of the same run, divided by the time taken; "on an H100" is that time at 3.0 TB/s, 800
TFLOP/s in 16 bits and 60 in fp32. Competitors that compile were timed separately, after the others."""
PARTS = ("transformer", "draw", "step", "decoder")
PREDICTED = "Predicted for an H100 before the first run on any GPU; **missed**: off by more than a third."


def step(report: Report, name: str) -> str:
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


def facts(report: Report) -> str:
    """What was measured, on what, with what, and how each step went."""
    about, rates = report["about"], report.get("op_times", {}).get("ceilings", {})
    ceilings = ", ".join(
        f"{rate / 1e12:.2f} TB/s copied" if name == "copy" else f"{rate / 1e12:.0f} TFLOP/s {name}"
        for name, rate in rates.items()
    )
    lines = provenance(about)
    lines["commit"] += f"; kernels {about['sources']}"
    lines["driver"] = f"{about['driver']}, CUDA {about['cuda']}, nvcc {about['nvcc']}"
    lines["ceilings"] = ceilings or "not measured"
    return listing(lines | {name: step(report, name) for name in SHARES})


def predictions(report: Report) -> str:
    """Predictions next to measurements."""
    rows = []
    for prediction in PREDICTIONS:
        figure, ratio = prediction.measured(report), prediction.ratio(report)
        shown = "not measured" if figure is None else f"{figure:.3g} {prediction.unit}"
        missed = " **missed**" if prediction.missed(report) else ""
        span = f"{prediction.least:g} to {prediction.most:g} {prediction.unit}"
        rows.append([prediction.what, span, shown, "" if ratio is None else f"{ratio:.2f}{missed}"])
    return f"{PREDICTED}\n\n" + markdown(["", "predicted", "measured", "measured / middle"], rows)


def sampling(result: Report) -> list[str]:
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


def not_timed(result: Report) -> list[str]:
    """What a timing step left out, and why."""
    missing = {**result.get("left_out", {}), **result.get("failed", {})}
    return (
        ["Left out:\n\n" + "\n".join(f"- {name}: {why}" for name, why in missing.items())] if missing else []
    )


def section(folder: Path = FOLDER / "results") -> str:
    """The whole part, including its title."""
    reports = newest(folder, lambda report: report["about"]["chip"])
    if not reports:
        return f"{TITLE}\n\n{NONE}\n\n{predictions({})}\n"
    parts = [TITLE, HEAD]
    for report in reports.values():
        parts += [f"## {report['about']['chip']}", facts(report), predictions(report)]
        if report.get("sampling", {}).get("rows"):
            parts += sampling(report["sampling"])
        parts += not_timed(report.get("sampling", {}))
        op_times = report.get("op_times", {})
        rows = op_times.get("rows", [])
        for op in dict.fromkeys(row["op"] for row in rows):
            mine = [row for row in rows if row["op"] == op]
            kernel = "" if mine[0]["kernel"] == "native" else "No CUDA kernel: plain PyTorch.\n\n"
            parts.append(f"### {op}\n\n{kernel}{table(mine, gpu=True)}")
        parts += not_timed(op_times)
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    rewrite(section())
