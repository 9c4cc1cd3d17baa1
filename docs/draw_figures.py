"""Draws the figures of docs/kernels.md, from the schedule and the bundled model themselves.

python docs/draw_figures.py
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

import var_ext
from var_ext import to_pil

HERE = Path(__file__).resolve().parent / "figures"
SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # of the published models, 256 px
TILE = 64  # rows of queries and of keys


def schedule() -> Figure:
    """The grids of all scales, and where their tokens stand in the sequence."""
    figure, (grids, line) = plt.subplots(2, 1, figsize=(8, 2.6), height_ratios=(3, 1))
    left = 0.0
    colours = plt.cm.viridis(np.linspace(0, 0.9, len(SIDES)))  # type: ignore[attr-defined]
    for side, colour in zip(SIDES, colours, strict=True):
        grids.pcolormesh(
            left + np.linspace(0, 1, side + 1),
            np.linspace(0, 1, side + 1),
            np.zeros((side, side)),
            facecolor="none",
            edgecolor=colour,
            cmap="Greys",
            lw=0.8,
        )
        grids.text(left + 0.5, -0.12, f"{side}x{side}", ha="center", va="top", fontsize=7)
        left += 1.15
    begin = 0
    for side, colour in zip(SIDES, colours, strict=True):
        line.barh(0, side * side, left=begin, color=colour, edgecolor="white", lw=0.5)
        begin += side * side
    line.set(xlabel="position in the sequence", yticks=[], xlim=(0, begin))
    grids.set(aspect="equal", xlim=(-0.1, left), ylim=(-0.35, 1.1))
    grids.axis("off")
    line.spines[["top", "left", "right"]].set_visible(False)
    return figure


def tiles() -> Figure:
    """Pairs of tiles of queries and keys: computed, computed under a mask, left out."""
    ends = np.cumsum([side * side for side in SIDES])
    scale = np.repeat(np.arange(len(SIDES)), [side * side for side in SIDES])
    figure, ax = plt.subplots(figsize=(4.6, 4.6))
    ax.imshow(scale[:, None] >= scale[None, :], cmap="Blues", vmin=0, vmax=2.5, interpolation="nearest")
    starts = [0]
    for first, last in pairwise(ends):
        if last - starts[-1] > TILE:  # whole scales share a tile if they fit; a larger one is split
            starts += range(first, last, TILE)
    for begin, end in zip(starts, [*starts[1:], ends[-1]], strict=True):
        seen = ends[scale[end - 1]]
        for key in range(0, seen, TILE):
            ax.add_patch(
                plt.Rectangle(  # type: ignore[attr-defined]
                    (key - 0.5, begin - 0.5), min(TILE, seen - key), end - begin, fill=False, ec="C1", lw=0.6
                )
            )
    ax.set(xlabel="key", ylabel="query")
    return figure


def residuals() -> Figure:
    """What each scale adds to a picture of the bundled model."""
    sampler = var_ext.load("digits", precision="fp32")
    with torch.no_grad():
        stages = sampler.scales([3], [7])[:, 0]  # (K, 3, S, S)
    figure, axes = plt.subplots(1, len(stages), figsize=(8, 1.7))
    for ax, side, picture in zip(axes, sampler.var.patch_nums, to_pil(stages), strict=True):
        ax.imshow(picture)
        ax.set_title(f"after {side}x{side}", fontsize=7)
        ax.axis("off")
    return figure


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for draw in (schedule, tiles, residuals):
        draw().savefig(HERE / f"{draw.__name__}.png", dpi=110, bbox_inches="tight")
