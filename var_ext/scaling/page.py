"""What was fitted, as a table, and as a page with plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from var_ext.checkpoints import atomic_write, write_json
from var_ext.evaluation.plots import NO_PLOTS, installed
from var_ext.scaling.laws import PAPER, UNITS
from var_ext.scaling.plots import plot_laws
from var_ext.scaling.study import AXES, Fit, Study

PAGE, FIGURES = "scaling.md", "scaling.json"
SYMBOL = {"size": "N", "flops": "C"}
TITLE = {"size": "Against parameters", "flops": "Against compute"}

READING = """\
L = E + (beta X)^-alpha; losses in nats a token, errors in percent; beta for N in billion parameters and C in PFLOP, as
in the paper, which writes alpha with the other sign. In brackets 90% intervals over the noise of runs. A law *holds* if
it has 5 sizes over 1.5 decades, r <= -.99 for log(L - E) against log X, no curvature beyond two sigma, and lies within
1% of L and 5% of L - E at every point and, fitted without the largest size, at that one too. r alone proves nothing.
*Too little data* is no pass."""


def as_markdown(study: Study) -> str:
    """Tables of all laws, why those fail that do, best sizes at fixed compute, and remarks."""
    parts = [section(study, axis) for axis in AXES]
    noise: dict[str, list[str]] = {}
    for name, text in {fit.name: str(fit.points.noise) for fit in study.fits}.items():
        noise.setdefault(text, []).append(name)
    parts.append("Noise of runs: " + "; ".join(f"{', '.join(names)} {text}" for text, names in noise.items()))
    if study.curves:
        parts += ["**Best sizes at fixed compute**", _isoflops(study)]
    remarks = [*(f"{name}: {why}" for name, why in study.lacking.items()), *study.notes]
    if remarks:
        parts.append("\n".join(f"- {remark}" for remark in remarks))
    return "\n\n".join(part for part in parts if part)


def section(study: Study, axis: str) -> str:
    """The laws against one axis; empty without any."""
    fits = [fit for fit in study.fits if fit.axis == axis]
    if not fits:
        return ""
    beta = f"beta ({SYMBOL[axis]} in {UNITS[axis][1]})"
    rows = [
        f"| loss | E | alpha | {beta} | r | curvature | largest predicted | verdict |",
        "|" + " --- |" * 8,
    ]
    rows += [_row(fit) for fit in fits]
    reasons = [f"- {_name(fit)} {fit.verdict}: {fit.reason}" for fit in fits if fit.verdict != "holds"]
    return "\n\n".join([f"**{TITLE[axis]}**", "\n".join(rows), *(["\n".join(reasons)] if reasons else [])])


def _row(fit: Fit) -> str:
    spans, axis = fit.intervals(), fit.axis

    def cell(text: str, key: str, digits: str = ".3g") -> str:
        if key not in spans:
            return text
        show = _power if key == "log10_beta" else lambda value: format(value, digits)
        return f"{text} ({show(spans[key][0])} to {show(spans[key][1])})"

    e = f"{float(fit.law.irreducible):.3g}" + ("" if fit.irreducible is None else ", given")
    values = {check.name: check.value for check in fit.checks}

    def figure(name: str, form: str) -> str:
        return "-" if values[name] is None else form.format(values[name])

    return (
        f"| {fit.name} | {cell(e, 'irreducible')} | {cell(f'{float(fit.law.alpha):.3g}', 'alpha')} | "
        f"{cell(_power(float(fit.law.log10_beta(axis))), 'log10_beta')} | {figure('correlation', '{:.4f}')} | "
        f"{figure('curvature', '{:+.1f} sigma')} | {figure('prediction', '{:+.2f}%')} | {fit.verdict} |"
    )


def _name(fit: Fit) -> str:
    return fit.name + ("" if fit.irreducible is None else f" with E = {fit.irreducible:g}")


def _power(log10: float) -> str:
    """A beta from its logarithm, which may be large where alpha is small."""
    return f"{10**log10:.3g}" if abs(log10) < 300 else f"1e{log10:.3g}"


def _isoflops(study: Study) -> str:
    lines = []
    for name, iso in study.best_sizes.items():
        if iso.refused:
            lines.append(f"- {name}: {iso.refused}")
        else:
            first, last = (f"{iso.sizes[k]:.3g} parameters at {iso.budgets[k]:.2g} FLOP" for k in (0, -1))
            lines.append(
                f"- {name}: N ~ C^{iso.exponent():.2f} at {len(iso.budgets)} budgets, from {first} to {last}"
            )
    return "\n".join(lines)


def write_page(study: Study, folder: Path) -> Path:
    """Writes scaling.json and scaling.md, with a plot an axis where matplotlib is installed, and returns the page.

    Raises:
        CheckpointError: a file cannot be written.
    """
    write_json(folder / FIGURES, study.as_dict())
    text = [f"# Scaling laws of {Path(study.source).name}", READING]
    if not installed():
        text.append(NO_PLOTS)
    else:
        for axis in AXES:
            if fits := [fit for fit in study.fits if fit.axis == axis]:
                picture = f"scaling-{SYMBOL[axis].lower()}.png"
                with atomic_write(folder / picture) as handle:
                    handle.write(plot_laws(fits, study.curves if axis == "flops" else {}))
                text.append(f"![{TITLE[axis]}: losses, laws and their 90% intervals]({picture})")
    text += [as_markdown(study), _beside_paper(study.fits)]
    with atomic_write(folder / PAGE) as handle:
        handle.write(("\n\n".join(text) + "\n").encode())
    return folder / PAGE


def _beside_paper(fits: Sequence[Fit]) -> str:
    """The published laws of the same losses, for comparison alone: another data set, tokenizer and range."""
    found = {(fit.axis, fit.name) for fit in fits} & PAPER.keys()
    rows = [
        f"| {name} | {SYMBOL[axis]} | {float(PAPER[axis, name].irreducible):g} | {float(PAPER[axis, name].alpha):g} | "
        f"{_power(float(np.asarray(PAPER[axis, name].log10_beta(axis))))} |"
        for axis, name in PAPER
        if (axis, name) in found
    ]
    head = ["| loss | against | E, given | alpha | beta |", "|" + " --- |" * 5]
    return "\n".join(
        ["**Published, on ImageNet at 256 px (arXiv 2404.02905, section 5.2)**", "", *head, *rows]
    )
