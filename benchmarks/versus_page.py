"""The comparison part of RESULTS.md, from the files of vs_official.py, vs_dit.py and cost.py in results/versus.

python benchmarks/versus_page.py                    # draws benchmarks/plots and writes that part of RESULTS.md anew
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import gpu_page  # noqa: E402
from tables import duration, markdown  # noqa: E402
from versus_plots import PARTS, Report, batches, draw, plot_name  # noqa: E402

TITLE = "# Beside other programs"
NONE = """No result yet: `python benchmarks/vs_official.py --official DIR`, `vs_dit.py` and `cost.py` write them to
`benchmarks/results/versus/`."""
HEAD = """Made by `python benchmarks/vs_official.py --official DIR`, `vs_dit.py` and `cost.py`, then
`python benchmarks/versus_page.py`. All weights are random. Competitors run in one process on the same machine and
alternate in laps after a warm-up lap; a figure is the median of the laps."""
TEXTS = {
    "official": """The published code, in fp32 and under autocast, and `var_ext` with the same weights and the same
random stream. Results are compared first: fp32 samples freely; the other precisions get the tokens of the published
fp32 run as input at every scale, and their tokens and images are compared with those of that run. A competitor with
wrong results is not timed.""",
    "dit": """DiT-XL/2 at 256 px as diffusers runs it (`DiTPipeline`, guidance on, the decoder of Stable Diffusion), and
`var_ext`, decoder and guidance included. Only a few steps of DiT were timed: an image of n steps is n times the median
step, plus the decoder.""",
    "cost": "`var_ext` alone, decoder and guidance included, with the FLOPs that `benchmarks/flops.py` counts.",
}
TITLES = {"official": "The published code", "dit": "DiT-XL/2", "cost": "Cost over batch and depth"}


def newest(folder: Path) -> list[Report]:
    """The last result of each kind on each chip, in the order of the kinds."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    latest: dict[tuple[str, str], Report] = {}
    for report in sorted(reports, key=lambda report: report["about"]["date"]):
        latest[report["kind"], report["about"]["chip"]] = report
    return [latest[key] for key in sorted(latest, key=lambda key: (list(TITLES).index(key[0]), key[1]))]


def facts(report: Report) -> str:
    """What was measured, on what, with what."""
    about, model = report["about"], report["model"]
    changed = " with uncommitted changes" if about["dirty"] else ""
    busy = " (**busy: do not trust these figures**)" if about["load"] > about["threads"] / 2 else ""
    lines = {
        "machine": f"{about['chip']}, {about['threads']} threads",
        "date": about["date"][:10],
        "versions": f"var_ext {about['var_ext']}, torch {about['torch']}, Python {about['python']}"
        + (f", diffusers {about['diffusers']}" if "diffusers" in about else ""),
        "commit": f"`{(about['commit'] or 'unknown')[:12]}`{changed}",
        "model": f"VAR d{model['depth']}" + (", **a toy**" if model["tiny"] else ", 256 px"),
        **({"published code": "with flash-attn"} if model.get("flash_attn") else {}),
        "load": f"{about['load']:.1f} processes in the minute before{busy}",
        "laps": str(report["laps"]),
        **({"TF32": tf32(report["tf32"])} if report.get("tf32") else {}),
        **(
            {} if report.get("finished", True) else {"**stopped**": "before its end; what it had stands here"}
        ),
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in lines.items())])


def tf32(allowed: Mapping[str, bool]) -> str:
    """Where torch may round float32 factors to 10 bits."""
    timed = "as torch does by itself, in convolutions" if allowed["time"] else "without it"
    return f"answers compared {'with' if allowed['answers'] else 'without'} it; timed {timed}"


def size(memory: Mapping[str, Any] | None, what: str) -> str:
    if not memory:
        return ""
    return memory["error"] if "error" in memory else f"{memory[what] / 1e9:.2f} GB"


def spread(seconds: list[float]) -> str:
    return f"{(max(seconds) - min(seconds)) / median(seconds):.0%}"


def latent(row: Report) -> float | None:
    """Seconds without the decoder, where the parts are known."""
    return median(row["seconds"]) - row["parts"]["decoder"][0] if "decoder" in row["parts"] else None


# ---------------------------------------------------------------------- tables


def official(report: Report) -> list[str]:
    answers = [
        [
            f"{row['who']} {row['precision']}",
            f"{row['tokens']:.2%}" + ("" if row["forced"] else ", on its own"),
            f"{row['psnr']:.0f} dB" if row["psnr"] < 200 else "equal",
        ]
        for row in report["answers"]
    ]
    parts = [markdown(["answers", "tokens equal", "images"], answers)]
    for batch, rows in batches(report).items():
        parts += [f"Batch {batch}:", times(batch, rows)]
        if split := [row for row in rows if set(PARTS) <= set(row["parts"])]:
            parts += [f"Batch {batch}, the parts of a call:", parts_table(split)]
    return parts


def times(batch: int, rows: list[Report]) -> str:
    """A row per competitor, with its speedup over the published code."""
    published = {r["precision"]: r for r in rows if r["who"] == "published" and r["seconds"]}
    columns = ["", "a call", "an image", "without decoder", "x published, same dtype", "x published fp32"]
    lines = []
    for row in rows:
        name, memory = f"{row['who']} {row['precision']}", row.get("memory")
        ends = [size(memory, "peak"), size(row.get("released"), "peak"), size(memory, "resting")]
        if not row["seconds"]:
            lines.append([name, row["error"], "", "", "", "", *ends, ""])
            continue
        mine, rest = median(row["seconds"]), latent(row)
        same = published.get({"int8": "bf16"}.get(row["precision"], row["precision"]))
        ratios = [f"{median(r['seconds']) / mine:.2f}" if r else "" for r in (same, published.get("fp32"))]
        shown = [duration(mine), duration(mine / batch), duration(rest) if rest else ""]
        lines.append([name, *shown, *ratios, *ends, spread(row["seconds"])])
    table = markdown([*columns, "peak memory", "with release", "at rest", "laps differ by"], lines)
    if any(row["precision"] == "int8" for row in rows):
        table += "\n\nint8 stands beside the published code under bf16 autocast."
    return table


def parts_table(rows: list[Report]) -> str:
    """Parts as rows, competitors as columns."""
    names = [f"{row['who']} {row['precision']}" for row in rows]
    count = len(rows[0]["parts"]["transformer"])
    lines = [
        [f"transformer, scale {k + 1}", *(duration(row["parts"]["transformer"][k]) for row in rows)]
        for k in range(count)
    ]
    for part in PARTS:
        shown = "transformer, all scales" if part == "transformer" else part
        lines.append([shown, *(duration(sum(row["parts"][part])) for row in rows)])
    return markdown(["", *names], lines)


def dit(report: Report) -> list[str]:
    rows = {(r["who"], r["precision"], r["batch"]): r for r in report["rows"]}
    lines, steps = [], next((list(r["of_steps"]) for r in report["rows"] if "of_steps" in r), [])
    for (who, precision, batch), row in rows.items():
        if who != "DiT":
            continue
        mine, name = rows["var_ext", precision, batch], f"{precision}, batch {batch}"
        memory = [size(row.get("memory"), "peak"), size(mine.get("memory"), "peak")]
        if not (row["seconds"] and mine["seconds"]):
            lines.append([name, row["error"] or mine["error"], *[""] * (2 * len(steps) + 2), *memory])
            continue
        ours, whole = median(mine["seconds"]), [row["of_steps"][n] for n in steps]
        step, decoder = median(row["parts"]["step"]), sum(row["parts"]["decoder"])
        shown = [duration(t / batch) for t in (step, decoder, *whole, ours)]
        lines.append([name, *shown, *(f"{t / ours:.1f}" for t in whole), *memory])
    columns = ["an image", "a step", "decoder", *(f"DiT, {n} steps" for n in steps), "var_ext"]
    columns += [*(f"x {n} steps" for n in steps), "peak memory, DiT", "var_ext"]
    said = [
        f"{precision}: runs of {' and '.join(check)} steps took "
        f"{' and '.join(f'{ratio:.2f}' for ratio in check.values())} of the seconds so predicted."
        for precision, check in report["linearity"].items()
        if check
    ]
    return [markdown(columns, lines), *said]


def cost(report: Report) -> list[str]:
    lines = []
    for row in report["rows"]:
        total = sum(row["flops"].values())
        name = [f"d{row['depth']}, {row['precision']}", str(row["batch"])]
        if not row["seconds"]:
            lines.append([*name, row["error"], "", f"{total / 1e9:.0f}", "", ""])
            continue
        mine, batch = median(row["seconds"]), row["batch"]
        shown = [
            duration(mine),
            duration(mine / batch),
            f"{total / 1e9:.0f}",
            f"{total * batch / mine / 1e9:.0f}",
        ]
        lines.append([*name, *shown, spread(row["seconds"])])
    columns = ["", "batch", "a call", "an image", "GFLOP an image", "GFLOP/s", "laps differ by"]
    return [markdown(columns, lines)]


TABLES: Mapping[str, Callable[[Report], list[str]]] = {"official": official, "dit": dit, "cost": cost}


# ---------------------------------------------------------------------- the page


def section(folder: Path = HERE / "results" / "versus", plots: Path = HERE / "plots") -> str:
    """The whole part, including its title, with the plots that exist."""
    reports = newest(folder)
    if not reports:
        return f"{TITLE}\n\n{NONE}\n"
    parts, kind = [TITLE, HEAD], None
    for report in reports:
        if report["kind"] != kind:
            kind = report["kind"]
            parts += [f"## {TITLES[kind]}", TEXTS[kind]]
        parts += [f"### {TITLES[kind]}, on {report['about']['chip']}", facts(report)]
        if (plots / plot_name(report)).is_file():
            parts.append(f"![{TITLES[kind]}]({plots.name}/{plot_name(report)})")
        parts += TABLES[kind](report)
    return "\n\n".join(parts) + "\n"


def put(page: str, text: str) -> str:
    """The page with `text` as its comparison part, before the GPU part."""
    before, _, _ = page.partition(f"\n{gpu_page.TITLE}\n")
    after = page[len(before) :]
    before = before.partition(f"\n{TITLE}\n")[0].rstrip("\n")
    return f"{before}\n\n{text}{after}"


def main() -> None:
    page = HERE / "RESULTS.md"
    draw(newest(HERE / "results" / "versus"), HERE / "plots")
    page.write_text(put(page.read_text(encoding="utf-8"), section()), encoding="utf-8")
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
