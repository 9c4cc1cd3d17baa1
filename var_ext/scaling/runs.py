"""Runs of a ladder, read from a table of anyone's: a row a run, or a row a point of a run's curve."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from var_ext.paths import user_path
from var_ext.scaling.columns import LOSSES, Column, find_columns
from var_ext.scaling.laws import Array

PROGRESS = ("flops", "tokens", "images", "step")  # what orders the points of a run, the first that is there


@dataclass(frozen=True)
class Run:
    """One training: its curve, of which the last point is its result.

    size: parameters as its table counts them. values: name to (P,) float64, points in their order: flops, tokens,
    images, losses in nats, errors in percent and their standard errors (NAME_se), those that the table has.
    """

    name: str
    size: float
    values: Mapping[str, Array]

    def last(self, name: str) -> float:
        """The result."""
        return float(self.values[name][-1])


@dataclass(frozen=True)
class Rung:
    """Runs that differ in their seed alone: one size, trained equally long."""

    size: float
    runs: tuple[Run, ...]

    def mean(self, name: str) -> float:
        """Of the results of all seeds; 0 where there is no such column."""
        return float(np.mean([run.last(name) if name in run.values else 0.0 for run in self.runs]))


@dataclass(frozen=True)
class Runs:
    """A table as read: its runs, the losses it has (loss_avg ... err_last ... loss_s1 ...), and columns left aside."""

    source: str
    runs: tuple[Run, ...]
    losses: tuple[str, ...]
    ignored: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        """Whether there is a column of this name."""
        return name in self.runs[0].values

    def rungs(self) -> list[Rung]:
        """Seeds put together, smallest size first, short trainings before long ones."""
        groups: dict[tuple[float, str], list[Run]] = defaultdict(list)
        for run in self.runs:
            measure = next(
                (run.last(name) for name in ("tokens", "images", "flops") if name in run.values), 0.0
            )
            groups[run.size, f"{measure:.4g}"].append(run)
        ordered = sorted(groups.items(), key=lambda item: (item[0][0], float(item[0][1])))
        return [Rung(size, tuple(runs)) for (size, _), runs in ordered]


def read_runs(path: str | os.PathLike[str], columns: Mapping[str, str] | None = None) -> Runs:
    """Reads a table of runs: CSV with a header, separated by commas, semicolons or tabs; columns in any order.

    Rows with the same run, or without that column the same size and seed, are points of one run's curve, which flops,
    tokens, images or steps put in order; a row alone is a run of which only the result is known. Other columns are left
    aside.

    Args:
        path: the file.
        columns: name to header (or HEADER:UNIT), where the names of `columns.ALIASES` do not fit.

    Raises:
        ValueError: the file cannot be read, is empty, lacks the size or any loss, or has a number that is none, is not
            finite, or is not positive; rows that repeat each other; only one size; losses that never differ.
    """
    source = os.fspath(path)
    try:
        text = user_path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"could not read {source}: {getattr(error, 'strerror', None) or error}") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 2:
        raise ValueError(f"{source} must have a header and a row a run, got {len(lines)} lines")
    delimiter = max(",;\t", key=lines[0].count)
    header, *rows = ([cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter))
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(
                f"{source}, row {number}: must have the {len(header)} cells of the header, got {len(row)}"
            )
    found = find_columns(header, columns or {})
    losses = tuple(name for name in found if name.startswith(("loss_", "err_")) and not name.endswith("_se"))
    _check_columns(source, header, found, losses)
    table = {
        name: _numbers(source, name, column, rows)
        for name, column in found.items()
        if name not in ("run", "seed")
    }
    for column, name in ((found[name], name) for name in losses if name.startswith("err_")):
        if column.factor is None and table[name].max() <= 1:
            raise ValueError(
                f"{source}: column {column} has no unit and no value above 1: write its header as "
                f"'{name} [%]' or '{name} [fraction]'"
            )
    runs = _runs(source, found, rows, table)
    sizes = {run.size for run in runs}
    if len(sizes) == 1:
        raise ValueError(f"{source}: a law needs runs of several sizes, got only {sizes.pop():g} parameters")
    if all(np.ptp([run.last(name) for run in runs]) == 0 for name in losses):
        raise ValueError(
            f"{source}: every run has the same loss in {', '.join(losses)}: there is no law to fit"
        )
    known = {column.index for column in found.values()}
    ignored = tuple(text for index, text in enumerate(header) if index not in known)
    return Runs(source, tuple(sorted(runs, key=lambda run: run.size)), losses, ignored)


def _check_columns(
    source: str, header: Sequence[str], found: Mapping[str, Column], losses: Sequence[str]
) -> None:
    there = f"the columns are {', '.join(map(repr, header))}"
    if "size" not in found:
        raise ValueError(
            f"{source} lacks the size of its runs: name a column size, params or N, or choose one with "
            f"--column size=HEADER; {there}"
        )
    if not losses:
        raise ValueError(
            f"{source} has no loss: name columns {LOSSES}, or choose one with --column loss_avg=HEADER; {there}"
        )
    orphans = [name for name in found if name.endswith("_se") and name.removesuffix("_se") not in losses]
    if orphans:
        raise ValueError(f"{source} has {orphans[0]} but no {orphans[0].removesuffix('_se')}; {there}")


def _numbers(source: str, name: str, column: Column, rows: Sequence[Sequence[str]]) -> Array:
    """A column's numbers, units taken into account, each finite and above 0; steps and standard errors may be 0."""
    may_be_zero = name == "step" or name.endswith("_se")
    found = []
    for number, row in enumerate(rows, start=2):
        cell = row[column.index]
        try:
            value = float(cell)
        except ValueError:
            raise ValueError(
                f"{source}, row {number}: {column} must be a number, got {cell!r}; units belong into the header"
            ) from None
        if not np.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
            raise ValueError(f"{source}, row {number}: {column} must be finite and positive, got {cell}")
        found.append(value * (column.factor or 1.0))
    return np.array(found)


def _runs(
    source: str, found: Mapping[str, Column], rows: Sequence[Sequence[str]], table: Mapping[str, Array]
) -> list[Run]:
    progress = next((name for name in PROGRESS if name in table), None)
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        text = {name: row[found[name].index] for name in ("run", "seed") if name in found}
        size = f"{table['size'][i]:g}"
        groups[(text["run"], text.get("seed", "")) if "run" in text else (size, text.get("seed", ""))].append(
            i
        )
    runs = []
    for key, members in groups.items():
        name = " seed ".join(part for part in key if part)
        if len({table["size"][i] for i in members}) > 1:
            raise ValueError(f"{source}: run {name} has rows of several sizes; give each run its own name")
        at = [0.0 if progress is None else table[progress][i] for i in members]
        order = np.argsort(at, kind="stable")
        for a, b in pairwise(order):
            if at[a] == at[b]:
                first, second = sorted((members[a] + 2, members[b] + 2))
                raise ValueError(
                    f"{source}: row {second} repeats row {first} (run {name}): leave one out, tell seeds apart by a "
                    "column seed, or points of a curve by step, tokens or flops"
                )
        index = [members[i] for i in order]
        values = {name: column[index] for name, column in table.items() if name != "size"}
        runs.append(Run(name, float(table["size"][members[0]]), values))
    return runs
