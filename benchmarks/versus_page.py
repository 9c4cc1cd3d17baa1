"""The comparison part of RESULTS.md, from the files of vs_official.py, vs_dit.py, cost.py and vs_training.py.

python benchmarks/versus_page.py                    # draws benchmarks/plots and writes that part of RESULTS.md anew
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from harness.report import FOLDER, Report, newest
from harness.results_page import duration, listing, markdown, provenance, rewrite
from versus_plots import PARTS, batches, draw, plot_name

TITLE = "# Beside other programs"
NONE = """No result yet: `python benchmarks/vs_official.py --official DIR`, `vs_dit.py`, `cost.py` and
`vs_training.py` write them to `benchmarks/results/versus/`."""
HEAD = """Made by `python benchmarks/vs_official.py --official DIR`, `vs_dit.py`, `cost.py` and
`vs_training.py --official DIR`, then `python benchmarks/versus_page.py`. All weights are random. Competitors run in one
process on the same machine and alternate in laps after a warm-up lap; a figure is the median of the laps."""
TEXTS = {
    "official": """The published code, in fp32 and under autocast, and `var_ext` with the same weights and the same
random stream. Results are compared first: fp32 samples freely; the other precisions get the tokens of the published
fp32 run as input at every scale, and their tokens and images are compared with those of that run. A competitor with
wrong results is not timed.""",
    "dit": """DiT-XL/2 at 256 px as diffusers runs it (`DiTPipeline`, guidance on, the decoder of Stable Diffusion), and
`var_ext`, decoder and guidance included. Only a few steps of DiT were timed: an image of n steps is n times the median
step, plus the decoder.""",
    "cost": "`var_ext` alone, decoder and guidance included, with the FLOPs that `benchmarks/flops.py` counts.",
    "training": """Forward, loss and backward of the transformer at 256 px, without the optimizer, beside the published
code: same weights, and bf16 under autocast for both. Loss and gradients are compared first.""",
}
TITLES = {
    "official": "The published code",
    "dit": "DiT-XL/2",
    "cost": "Cost over batch and depth",
    "training": "A training step",
}


def reports(folder: Path) -> list[Report]:
    """The last result of each kind on each chip, in the order of the kinds."""
    found = newest(folder, lambda report: (report["kind"], report["about"]["chip"]))
    return [found[key] for key in sorted(found, key=lambda key: (list(TITLES).index(key[0]), key[1]))]


def facts(report: Report) -> str:
    """What was measured, on what, with what."""
    model = report["model"]
    lines = provenance(report["about"])
    lines["model"] = f"VAR d{model['depth']}" + (", **a toy**" if model["tiny"] else ", 256 px")
    if model.get("flash_attn"):
        lines["published code"] = "with flash-attn"
    lines["laps"] = str(report["laps"])
    if report.get("tf32"):
        lines["TF32"] = tf32(report["tf32"])
    if not report.get("finished", True):
        lines["**stopped**"] = "before its end; what it had stands here"
    return listing(lines)


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


def training(report: Report) -> list[str]:
    rows = {(r["depth"], r["batch"], r["precision"], r["who"]): r for r in report["rows"]}
    lines = []
    for (depth, batch, precision, who), row in rows.items():
        name = [f"d{depth}, batch {batch}, {precision}", who]
        published = rows[depth, batch, precision, "published"]["seconds"]
        if not row["seconds"]:
            lines.append([*name, row["error"], *[""] * 6])
            continue
        mine, least = median(row["seconds"]), min(row["seconds"])
        ratios = (
            [f"{median(published) / mine:.2f}", f"{min(published) / least:.2f}"] if published else ["", ""]
        )
        parts = [duration(sum(row["parts"][part])) for part in ("forward", "loss", "backward")]
        lines.append([*name, duration(mine), *ratios, *parts, spread(row["seconds"])])
    columns = [
        "",
        "",
        "a step",
        "x published",
        "fastest laps",
        "forward",
        "loss",
        "backward",
        "laps differ by",
    ]
    return [markdown(columns, lines)]


TABLES: Mapping[str, Callable[[Report], list[str]]] = {
    "official": official,
    "dit": dit,
    "cost": cost,
    "training": training,
}


# ---------------------------------------------------------------------- the page


def section(folder: Path = FOLDER / "results" / "versus", plots: Path = FOLDER / "plots") -> str:
    """The whole part, including its title, with the plots that exist."""
    found = reports(folder)
    if not found:
        return f"{TITLE}\n\n{NONE}\n"
    parts, kind = [TITLE, HEAD], None
    for report in found:
        if report["kind"] != kind:
            kind = report["kind"]
            parts += [f"## {TITLES[kind]}", TEXTS[kind]]
        parts += [f"### {TITLES[kind]}, on {report['about']['chip']}", facts(report)]
        if (plots / plot_name(report)).is_file():
            parts.append(f"![{TITLES[kind]}]({plots.name}/{plot_name(report)})")
        parts += TABLES[kind](report)
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    draw(reports(FOLDER / "results" / "versus"), FOLDER / "plots")
    rewrite(section())
