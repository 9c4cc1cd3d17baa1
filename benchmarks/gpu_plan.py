"""What is timed on a GPU: shapes, their order, and lower bounds for an H100.

python benchmarks/gpu_plan.py [adaln]       # nothing is timed; files whose names contain this
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import case as cases  # noqa: E402
from case import Case  # noqa: E402

FIRST = ("block_causal_attention", "cached_attention", "qk_norm")  # should time run out
# Rates of an H100 assumed by the plan: bytes and FLOPs a second. The report has the measured ones.
H100 = {"copy": 3.0e12, "bf16": 800e12, "fp16": 800e12, "fp32": 60e12}


def files(only: str) -> dict[str, ModuleType]:
    """Op -> its benchmark file, for those that run on a GPU and have `only` in their names."""
    names = [path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py") if only in path.stem]
    names.sort(key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    modules = {name: importlib.import_module(f"bench_{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "GPU_SHAPES")}


def dtype_of(shape: str) -> str:
    """The dtype in a shape's name."""
    return next((name for name in ("bf16", "fp16") if name in shape), "fp32")


def least(case: Case, shape: str, limits: dict[str, float]) -> float:
    """Seconds for the op's bytes or FLOPs at these rates, whichever is more."""
    computing = (case.flops - case.tensor_flops) / limits[dtype_of(shape)]
    return max(case.bytes / limits["copy"], computing + case.tensor_flops / limits["bf16"])


def build(module: ModuleType, arguments: dict[str, Any], device: str, seed: int = 0) -> Case:
    torch.manual_seed(seed)
    with torch.device(device):
        built: Case = module.case(**arguments)
    return built


def counts(op: str, shape: str, case: Case) -> dict[str, Any]:
    """What is known about a shape before timing."""
    return {
        "op": op,
        "shape": shape,
        "dtype": dtype_of(shape),
        "bytes": case.bytes,
        "flops": case.flops,
        "launches": case.launches,
        "roofline_us": least(case, shape, H100) * 1e6,
    }


@dataclass(frozen=True)
class Job:
    """One shape of an op, with its compiled or its other competitors."""

    op: str
    module: ModuleType
    shape: str
    arguments: dict[str, Any]
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.op}, {self.shape}{', compiled' if self.compiled else ''}"


def jobs(shapes: dict[str, tuple[ModuleType, dict[str, Any]]]) -> list[Job]:
    """In timing order, for op -> its file and its shapes: first the first shape of every op, then the second
    ones, and so on; then the same for competitors that compile."""
    todo = [
        (place, Job(op, module, shape, arguments))
        for op, (module, given) in shapes.items()
        for place, (shape, arguments) in enumerate(given.items())
    ]
    plain = [job for _, job in sorted(todo, key=lambda pair: pair[0])]  # ops keep their order
    late = [job for job in plain if set(job.module.COMPETITORS) & set(cases.COMPILED)]
    return plain + [replace(job, compiled=True) for job in late]


def plan(only: str) -> Iterator[dict[str, Any]]:
    """Every job in timing order, built of meta tensors (no memory)."""
    for job in jobs({op: (module, module.GPU_SHAPES) for op, module in files(only).items()}):
        if not job.compiled:
            case = build(job.module, job.arguments, "meta")
            yield {**counts(job.op, job.shape, case), "competitors": list(case.competitors)}


def show_plan(only: str) -> None:
    for row in plan(only):
        size = f"{row['bytes'] / 1e6:.1f} MB, {row['flops'] / 1e9:.1f} GFLOP"
        least = f"{row['launches'] or '?'} launches, {row['roofline_us']:.1f} us at least on an H100"
        print(f"{row['op']}, {row['shape']}: {size}, {least}; {', '.join(row['competitors'])}")


if __name__ == "__main__":
    show_plan("".join(sys.argv[1:]))
