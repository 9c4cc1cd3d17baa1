"""What the comparisons of samplers share: their options, and a result file that grows row by row."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from harness.clock import Timed, clock_of
from harness.memory import in_fresh_process
from harness.report import FOLDER, save, slug
from harness.results_page import duration


def numbers(text: str) -> list[int]:
    """1,8 -> [1, 8]"""
    return [int(part) for part in text.split(",")]


def words(text: str) -> list[str]:
    """fp32,bf16 -> ["fp32", "bf16"]"""
    return text.split(",")


def parser_of(
    text: str | None, *, laps: int, batch_sizes: list[int], memory: bool
) -> argparse.ArgumentParser:
    """The options of all comparisons.

    Args:
        text: the program's docstring.
        laps: the default; so is `batch_sizes`.
        memory: whether fresh processes of the program measure memory: `memory_of` calls it with --memory-of.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--depth", type=int, default=16, help="of the VAR model")
    add("--batch-sizes", type=numbers, default=batch_sizes, help="what does not fit is reported so")
    add("--precisions", type=words, default=None, help="of fp32, bf16, fp16 (GPU), int8 (CPU)")
    add("--laps", type=int, default=laps)
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--tiny", action="store_true", help="toys: a tokenizer of four scales, depth 2")
    add(
        "--json",
        type=Path,
        help="the result file; else one in --folder, named after the program and the chip",
    )
    add("--folder", type=Path, default=FOLDER / "results" / "versus", help="of the result file")
    if memory:
        add("--no-memory", action="store_true", help="start no processes to measure memory")
        add("--memory-of", nargs=3, metavar=("WHO", "PRECISION", "BATCH"), help=argparse.SUPPRESS)
    return parser


def chosen(parser: argparse.ArgumentParser, possible: dict[str, Sequence[str]]) -> argparse.Namespace:
    """The parsed options; refuses precisions that a device, "cpu" or "cuda", has not got."""
    options = parser.parse_args()
    if options.tiny:
        options.depth = 2
    if (kind := options.device.type) not in possible:
        parser.error(f"--device may be {' or '.join(possible)}, got {kind}")
    able = possible[kind]
    options.precisions = options.precisions or list(able)
    if unknown := set(options.precisions) - set(able):
        parser.error(f"--precisions may be {', '.join(able)} here, got {', '.join(sorted(unknown))}")
    return options


class Comparison:
    """The result file: benchmarks/results/versus/official-amd-epyc-2-cores.json, of the last run on a chip.

    Written as figures arrive, so that a stopped run keeps them; "finished" says whether it is complete.

    Args:
        kind: "official", "dit" or "cost".
        script: the program.
        known: what is reported beside the rows, "about" among it.
    """

    def __init__(self, kind: str, script: str, options: argparse.Namespace, /, **known: Any) -> None:
        self.options, self.script, self.clock = options, script, clock_of(options.device)
        self.rows: list[dict[str, Any]] = []
        self.report = dict(kind=kind, **known, laps=options.laps, rows=self.rows)
        self.path = options.json or options.folder / f"{kind}-{slug(known['about'])}.json"

    def save(self, *, finished: bool = False) -> None:
        save(self.path, {**self.report, "finished": finished})
        if finished:
            print(f"wrote {self.path}; the page: python benchmarks/versus_page.py")

    def add(self, result: Timed, **row: Any) -> None:
        self.rows.append(row | result.as_dict())
        shown = duration(median(result.seconds)) if result.seconds else result.error
        print(
            f"{', '.join(f'{name} {of}' for name, of in row.items() if not isinstance(of, dict))}: {shown}",
            flush=True,
        )
        self.save()

    def memory(self, who: str, row: dict[str, Any], *more: str) -> dict[str, Any]:
        """Of a competitor alone in a fresh process of the program."""
        passed = ["--depth", str(self.options.depth), "--device", str(self.options.device), *more]
        passed += ["--tiny"] if self.options.tiny else []
        return in_fresh_process(
            self.script, [*passed, "--memory-of", who, row["precision"], str(row["batch"])]
        )
