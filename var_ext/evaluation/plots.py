"""Plots of reports, as PNG files; they need matplotlib, the extra `plots`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from var_ext.evaluation.tokenizer_report import ScaleRow

NO_PLOTS = "There are no plots: they need matplotlib, `pip install 'var_ext[plots]'`."


def installed() -> bool:
    """Whether there will be plots."""
    return find_spec("matplotlib") is not None


def scale_bars(rows: Sequence[ScaleRow]) -> bytes:
    """Codes in use beside those allowed, perplexity, and PSNR up to each scale where it was measured."""
    measured = all(row.psnr is not None for row in rows)
    figure, axes = _figure(3 if measured else 2)
    names = [f"{row.side}x{row.side}" for row in rows]
    axes[0].bar(names, [row.allowed for row in rows], color="0.85", label="allowed")
    axes[0].bar(names, [row.codes for row in rows], width=0.5, label="in use")
    axes[0].set_title("codes")
    axes[0].legend()
    axes[1].bar(names, [row.perplexity for row in rows])
    axes[1].set_title("perplexity")
    if measured:
        axes[2].plot(names, [row.psnr for row in rows], marker="o")
        axes[2].set_title("PSNR up to the scale (dB)")
    return _png(figure)


def curves(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """The course of a training from the lines of its log: loss, and perplexity and usage of each scale."""
    figure, axes = _figure(3)
    for phase in ("train", "val"):
        mine = [line for line in lines if line.get("phase") == phase]
        axes[0].plot(
            [line["step"] for line in mine], [line["loss"] for line in mine], marker=".", label=phase
        )
    axes[0].set_title("loss")
    axes[0].set_yscale("log")
    axes[0].legend()
    for axis, name in zip(axes[1:], ("perplexity", "usage"), strict=True):
        found = [line for line in lines if line.get("phase") == "val" and name in line]
        for k in range(len(found[-1][name]) if found else 0):
            values = [line[name][k] for line in found]
            axis.plot([line["step"] for line in found], values, marker=".", label=f"scale {k}")
        axis.set_title(f"{name} in validation" + (" (%)" if name == "usage" else ""))
        if found:
            axis.legend(fontsize="x-small")
    return _png(figure)


def trade_off(cells: Sequence[Mapping[str, Any]], distance: str) -> bytes:
    """A line for each top-p: the distance over guidance, and quality beside variety where figures of both are there.

    Args:
        cells: with "cfg", "top_p" and "figures", see `guidance_grid`.
        distance: the name of the Fréchet distance, such as "FID".
    """
    names = list(cells[0]["figures"])
    precision, recall = (next((n for n in names if n.startswith(k)), None) for k in ("precision", "recall"))
    pairs = [("cfg", distance)]
    pairs += [("IS", distance)] if "IS" in names else []
    pairs += [(recall, precision)] if precision and recall else []
    figure, axes = _figure(len(pairs))
    for axis, (x, y) in zip([axes] if len(pairs) == 1 else axes, pairs, strict=True):
        for top_p in dict.fromkeys(cell["top_p"] for cell in cells):
            mine = sorted((cell for cell in cells if cell["top_p"] == top_p), key=lambda cell: cell["cfg"])
            points = [({"cfg": cell["cfg"], **cell["figures"]}, cell["cfg"]) for cell in mine]
            axis.plot(
                [point[x] for point, _ in points],
                [point[y] for point, _ in points],
                marker="o",
                label=f"top-p {top_p:g}",
            )
            for point, cfg in points if x != "cfg" else ():
                axis.annotate(f"{cfg:g}", (point[x], point[y]), fontsize="x-small")
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.legend(fontsize="x-small")
    return _png(figure)


def _figure(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and looks for a display

    figure = Figure(figsize=(4.5 * count, 3.2), layout="constrained")
    return figure, figure.subplots(1, count)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=80)
    return out.getvalue()
