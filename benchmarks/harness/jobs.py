"""The cases in the files bench_NAME.py: which are timed, in which order, and the least they can take.

A file gives `SHAPES` (name -> arguments), `GPU_SHAPES` for a GPU, `SMOKE` (arguments small enough for a test) and a
function `case(**arguments) -> Case`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from harness.case import COMPILED, Case

FOLDER = Path(__file__).resolve().parent.parent
FIRST = ("block_causal_attention", "cached_attention", "qk_norm")  # should time run out
# Rates of an H100 assumed by the plan: bytes and FLOPs a second. The report has the measured ones.
H100 = {"copy": 3.0e12, "bf16": 800e12, "fp16": 800e12, "fp32": 60e12, "tensor": 800e12}
Arguments = dict[str, Any]


def files(only: str = "") -> dict[str, ModuleType]:
    """Name -> benchmark file, for those that have `only` in their names."""
    names = [path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")]
    names.sort(key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    return {name: importlib.import_module(f"bench_{name}") for name in names if only in name}


def dtype_of(shape: str) -> str:
    """The dtype in a shape's name."""
    return next((name for name in ("bf16", "fp16") if name in shape), "fp32")


def least(case: Case, shape: str, rates: Mapping[str, float]) -> float:
    """Seconds for the op's bytes or FLOPs at these rates, whichever is more; "tensor" is the rate of tensor cores."""
    apart = case.tensor_flops if "tensor" in rates else 0
    computing = (case.flops - apart) / rates[dtype_of(shape)] + (apart / rates["tensor"] if apart else 0)
    return max(case.bytes / rates["copy"], computing)


def build(module: ModuleType, arguments: Arguments, device: str | torch.device, seed: int = 0) -> Case:
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
        "images": case.images,
        "launches": case.launches,
        "roofline_us": least(case, shape, H100) * 1e6,
    }


@dataclass(frozen=True)
class Job:
    """One shape of an op, with its compiled or its other competitors; None: with all."""

    op: str
    module: ModuleType
    shape: str
    arguments: Arguments
    compiled: bool | None = None

    def __str__(self) -> str:
        return f"{self.op}, {self.shape}{', compiled' if self.compiled else ''}"

    def takes(self, competitor: str) -> bool:
        return self.compiled is None or (competitor in COMPILED) == self.compiled


def jobs(shapes: Mapping[str, tuple[ModuleType, Mapping[str, Arguments]]], *, apart: bool) -> list[Job]:
    """In timing order, for op -> its file and its shapes: first the first shape of every op, then the second ones,
    and so on.

    Args:
        apart: whether competitors that compile come last, by themselves: what they take is hard to foresee.
    """
    todo = [
        (place, Job(op, module, shape, arguments, False if apart else None))
        for op, (module, given) in shapes.items()
        for place, (shape, arguments) in enumerate(given.items())
    ]
    plain = [job for _, job in sorted(todo, key=lambda pair: pair[0])]  # ops keep their order
    compiling = {
        op
        for op, (module, _) in shapes.items()
        if apart
        and hasattr(module, "GPU_SHAPES")
        and set(build(module, module.SMOKE, "meta").competitors) & set(COMPILED)
    }
    return plain + [replace(job, compiled=True) for job in plain if job.op in compiling]


def show_plan(only: str) -> None:
    """Every shape for a GPU in timing order, built of meta tensors (no memory), with lower bounds for an H100."""
    shapes = {op: (file, file.GPU_SHAPES) for op, file in files(only).items() if hasattr(file, "GPU_SHAPES")}
    for job in jobs(shapes, apart=False):
        case = build(job.module, job.arguments, "meta")
        row = counts(job.op, job.shape, case)
        size = f"{row['bytes'] / 1e6:.1f} MB, {row['flops'] / 1e9:.1f} GFLOP"
        bound = f"{row['launches'] or '?'} launches, {row['roofline_us']:.1f} us at least on an H100"
        print(f"{job}: {size}, {bound}; {', '.join(case.competitors)}")
