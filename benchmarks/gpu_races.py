"""Times the ops on a GPU: each benchmark file that gives `GPU_SHAPES`, shape by shape, its competitors in turn.

    python benchmarks/gpu_races.py --out races.json [--only adaln] [--seconds 240]
    python benchmarks/gpu_races.py --plan

`make gpu` calls this. A figure is the median over laps of the median of a lap, in seconds on the GPU's own clock;
before each call a write over the L2 cache. Every competitor is checked against the reference first. `--plan` times
nothing: what would run, with the time that an H100 could not beat.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import contest as contests
import torch
from torch._subclasses import FakeTensorMode

from var_ext import _C, backend

HERE = Path(__file__).parent
# What the plan counts with, of an H100: bytes and products a second. The report has those that were measured.
H100 = {"copy": 3.0e12, "bf16": 800e12, "fp16": 800e12, "fp32": 60e12}
LAPS, LAP_SECONDS, LEAST_CALLS = 3, 0.03, 5
WITH_COMPILER = 2  # shapes of a file for which competitors wait for a compiler: tens of seconds each
FIRST = ("block_causal_attention", "cached_attention", "qk_norm")  # should time run out


def modules(only: str = "") -> list[ModuleType]:
    """The benchmark files that run on a GPU."""
    names = sorted(path.stem for path in HERE.glob("bench_*.py"))
    names.sort(key=lambda name: name.removeprefix("bench_") not in FIRST)
    found = [importlib.import_module(name) for name in names if only in name]
    return [module for module in found if hasattr(module, "GPU_SHAPES")]


def op_of(module: ModuleType) -> str:
    return module.__name__.removeprefix("bench_")


def dtype_of(shape: str) -> str:
    return next((name for name in ("bf16", "fp16") if name in shape), "fp32")


def least_seconds(contest: contests.Contest, shape: str, ceilings: dict[str, float]) -> float:
    """The larger of the times that the bytes and the products take at best."""
    return max(contest.bytes / ceilings["copy"], contest.flops / ceilings[dtype_of(shape)])


def measured_ceilings() -> dict[str, float]:
    """Bytes a second of a large copy, read and written; operations a second of a large product."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    ceilings = {"copy": 2 * contests.nbytes(source) / timed(lambda: target.copy_(source), None)}
    for name, dtype, side in (
        ("bf16", torch.bfloat16, 8192),
        ("fp16", torch.float16, 8192),
        ("fp32", torch.float32, 4096),
    ):
        a, b = torch.randn(2, side, side, device="cuda").to(dtype)
        ceilings[name] = 2 * side**3 / timed(lambda a=a, b=b: a @ b, None)  # type: ignore[misc]
    return ceilings


def timed(call: Callable[[], Any], cache: torch.Tensor | None) -> float:
    """The median time of a call on the GPU, in seconds. The host runs ahead while `cache` is written."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < LEAST_CALLS or time.perf_counter() - begin < LAP_SECONDS:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cache is not None:
            cache.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def entrants(module: ModuleType, index: int, contest: contests.Contest) -> list[str]:
    """Competitors of a shape: those that need a compiler take part in the first shapes only."""
    return [name for name in contest.competitors if name not in contests.COMPILED or index < WITH_COMPILER]


def race(module: ModuleType, index: int, shape: str, cache: torch.Tensor) -> dict[str, Any]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        contest = module.contest(**module.GPU_SHAPES[shape])
        laps: dict[str, list[float]] = {}
        failed: dict[str, str] = {}
        for name in entrants(module, index, contest):
            try:
                contest.verify(name)
                laps[name] = []
            except Exception as error:  # a competitor that does not run here is reported, not fatal
                failed[name] = f"{type(error).__name__}: {error}"[:300]
        for _ in range(LAPS):
            for name, times in laps.items():
                times.append(timed(contest.competitors[name], cache))
    return dict(
        op=op_of(module),
        shape=shape,
        dtype=dtype_of(shape),
        seconds={name: median(times) for name, times in laps.items()},
        spread={name: (max(times) - min(times)) / median(times) for name, times in laps.items()},
        failed=failed,
        bytes=contest.bytes,
        flops=contest.flops,
        launches=contest.launches,
        kernel="native" if backend.use_native(op_of(module), "cuda") else "reference",
    )


def plan(only: str = "") -> Iterator[dict[str, Any]]:
    """What would run, and its least time on an H100; nothing is computed."""
    for module in modules(only):
        for index, (shape, given) in enumerate(module.GPU_SHAPES.items()):
            with FakeTensorMode(allow_non_fake_inputs=True):
                contest = module.contest(**given)
            yield dict(
                op=op_of(module),
                shape=shape,
                competitors=entrants(module, index, contest),
                bytes=contest.bytes,
                flops=contest.flops,
                launches=contest.launches,
                least_on_h100=least_seconds(contest, shape, H100),
            )


def run(only: str, seconds: float) -> dict[str, Any]:
    """All races, as far as the time reaches: what was left out is named."""
    begin, rows, left_out = time.perf_counter(), [], []
    ceilings = measured_ceilings()
    cache = torch.empty(2**26, device="cuda")  # 256 MB
    for module in modules(only):
        for index, shape in enumerate(module.GPU_SHAPES):
            if time.perf_counter() - begin > seconds:
                left_out.append(f"{op_of(module)}: {shape}")
                continue
            rows.append(race(module, index, shape, cache))
            print(line(rows[-1], ceilings), flush=True)
            torch.cuda.empty_cache()
    return dict(ceilings=ceilings, rows=rows, left_out=left_out, build=_C.build_info())


def line(row: dict[str, Any], ceilings: dict[str, float]) -> str:
    times = ", ".join(f"{name} {t * 1e6:.1f}" for name, t in row["seconds"].items())
    mine = row["seconds"].get("var_ext")
    least = max(row["bytes"] / ceilings["copy"], row["flops"] / ceilings[row["dtype"]])
    share = (
        f"{least / mine:.0%} of the ceiling" if mine else f"var_ext failed: {row['failed'].get('var_ext')}"
    )
    return f"{row['op']}, {row['shape']}: {times} us; {share}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the figures, as JSON")
    parser.add_argument("--only", default="", help="files whose names contain this")
    parser.add_argument("--seconds", type=float, default=240.0, help="shapes after that are left out")
    parser.add_argument("--plan", action="store_true")
    options = parser.parse_args()
    if options.plan:
        for row in plan(options.only):
            size = f"{row['bytes'] / 1e6:.1f} MB, {row['flops'] / 1e9:.1f} GFLOP"
            least = (
                f"{row['launches'] or '?'} launches, {row['least_on_h100'] * 1e6:.1f} us at least on an H100"
            )
            print(f"{row['op']}, {row['shape']}: {size}, {least}; {', '.join(row['competitors'])}")
        return
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU to race on; --plan shows what would run")
    result = run(options.only, options.seconds)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
