"""Tables of runs of known laws, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from var_ext.scaling import Noise, Points
from var_ext.scaling.laws import Array, Law

SIZES = 18432.0 * np.array([2, 3, 4, 5, 6, 8, 10]) ** 3  # heads of 32: .147M to 18.4M, 2.1 decades
SEEDS = np.array([3, 3, 1, 1, 1, 1, 1])
TRUE = Law.of(0.3, 1000, 1.5, "size")  # losses of 3.28 to 1.92


def points(
    x: Array, loss: Array, seeds: Sequence[int] | Array | None = None, sd: float = 0.0, dof: int = 0
) -> Points:
    """Independent points, with the noise that is known of runs."""
    count = np.ones(len(x)) if seeds is None else np.asarray(seeds, float)
    return Points(
        np.asarray(x), np.asarray(loss), np.arange(len(x)), count, np.zeros(len(x)), Noise(sd**2, dof, False)
    )


def write(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]], delimiter: str = ",") -> Path:
    lines = [delimiter.join(map(str, row)) for row in (header, *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def ladder(sd: float = 0.002, law: Callable[[Array], Array] = TRUE.loss) -> list[list[object]]:
    """Rows of results: size, seed, loss_avg, tokens, flops."""
    rng = np.random.default_rng(0)
    rows: list[list[object]] = []
    for size, seeds, loss in zip(SIZES, SEEDS, law(SIZES), strict=True):
        rows += [[size, k, loss + sd * rng.standard_normal(), 1.3e8, 6 * size * 1.3e8] for k in range(seeds)]
    return rows


def chinchilla(n: Array | float, tokens: Array) -> Array:
    """E + A / N^.35 + B / D^.3: a surface whose best size at C FLOP is known, see `best_size`."""
    return 1.0 + (n / 1e4) ** -0.35 + 2 * (tokens / 1e6) ** -0.3


def best_size(flops: float) -> float:
    """The lowest point of `chinchilla` with 6 N D = C, by search."""
    n = np.geomspace(1e3, 1e10, 200001)
    return float(n[chinchilla(n, flops / (6 * n)).argmin()])


def curves(tokens: float = 2e9, sizes: Array = SIZES, sd: float = 0.001) -> list[list[object]]:
    """Rows of curves on that surface: run, size, seed, step, tokens, flops, loss_avg; seeds at the two smallest."""
    rng = np.random.default_rng(0)
    rows: list[list[object]] = []
    for i, size in enumerate(sizes):
        for seed in range(2 if i < 2 else 1):
            off = sd * rng.standard_normal()
            for step, seen in enumerate(np.geomspace(tokens / 3e3, tokens, 15)):
                rows.append(
                    [f"d{i}", size, seed, step, seen, 6 * size * seen, float(chinchilla(size, seen)) + off]
                )
    return rows
