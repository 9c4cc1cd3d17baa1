"""Times the ops on a GPU: each benchmark file that gives `GPU_SHAPES`, shape by shape, its competitors in turn.

    python benchmarks/time_ops_gpu.py --out op_times.json [--only adaln] [--seconds 200]
    python benchmarks/time_ops_gpu.py --smoke --out op_times.json   # each file's smallest shape, on the CPU: the wiring

`make gpu` calls this. Every competitor is checked against the reference first; a figure is the median over laps, on the
GPU's own clock. Every op's first shape comes before any second one; competitors that compile are timed last, apart.
Shapes left out for time are listed and are no failure. Two figures of each: "call", one of many calls from Python,
launches included; "graph", the same calls replayed from a CUDA graph if one can be captured, the GPU's time alone.
Inputs that would stay in the L2 cache are rotated with other sets.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import case as cases  # noqa: E402
from case import Case  # noqa: E402
from gpu_plan import Job, build, counts, files, jobs, least  # noqa: E402
from result_files import save  # noqa: E402

from var_ext import _C, backend  # noqa: E402

COMPILING = 12.0  # seconds a file's competitors may spend compiling; later shapes leave them out
LAP = 4e-3  # target seconds of work of a competitor in a lap
COPIES = 48  # sets of inputs at most


class Cpu:
    """The clock of the smoke run: its readings mean nothing, but every line of the timing code runs."""

    cache = 0

    def stream(self) -> Any:
        return nullcontext()

    def time(self, calls: list[Callable[[], Any]], rounds: int) -> float:
        start = time.perf_counter()
        for _ in range(rounds):
            for call in calls:
                call()
        return (time.perf_counter() - start) / (rounds * len(calls))

    def capture(self, calls: list[Callable[[], Any]]) -> Callable[[], Any]:
        return lambda: [call() for call in calls]

    def settle(self) -> None:
        """Wait for all work; raises its errors."""

    def clear(self) -> None:
        """Free what a shape needed. No garbage collection in between: a capture must not free another graph."""
        gc.collect()


class Gpu(Cpu):
    """CUDA events around calls on a stream of its own: kernels on any other stream would show as errors."""

    def __init__(self) -> None:
        self.own = torch.cuda.Stream()
        self.cache = torch.cuda.get_device_properties(0).L2_cache_size

    def stream(self) -> Any:
        return torch.cuda.stream(self.own)

    def time(self, calls: list[Callable[[], Any]], rounds: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(rounds):
            for call in calls:
                call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (rounds * len(calls))

    def capture(self, calls: list[Callable[[], Any]]) -> Callable[[], Any]:
        # a call with a host sync cannot be captured: found here, since a failed capture breaks later ones
        torch.cuda.set_sync_debug_mode("error")
        try:
            for call in calls:
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()  # on the timing stream; `torch.cuda.graph` would empty the allocator each time
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
        return graph.replay

    def settle(self) -> None:
        torch.cuda.synchronize()

    def clear(self) -> None:
        self.settle()
        torch._dynamo.reset()  # earlier compiled shapes count towards a limit
        super().clear()
        torch.cuda.empty_cache()


def ceilings(clock: Cpu, device: str, size: int, side: int) -> dict[str, float]:
    """Bytes a second of a large copy, FLOP a second of large matmuls, on random numbers."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)

    def best(call: Callable[[], Any]) -> float:
        clock.time([call], 2)
        return median(clock.time([call], 3) for _ in range(cases.LAPS))

    found = {"copy": 2 * size / best(lambda: target.copy_(source))}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        found[name] = 2 * side**3 / best(lambda a=a, b=b: torch.mm(a, b))  # type: ignore[misc]
    return found


class Timer:
    """The rows of one run.

    Args:
        clock: times calls.
        device: of the tensors.
        limits: what `ceilings` found.
    """

    def __init__(self, clock: Cpu, device: str, limits: dict[str, float]) -> None:
        self.clock, self.device, self.limits = clock, device, limits
        self.rows: list[dict[str, Any]] = []
        self.compiling: defaultdict[str, float] = defaultdict(float)  # op -> seconds that compilers took

    def run(self, job: Job) -> dict[str, Any]:
        """Check and time the competitors of a job, and keep them in the row of their shape."""
        op, module, shape, arguments = job.op, job.module, job.shape, job.arguments
        with self.clock.stream():
            first = build(module, arguments, self.device)
            row = next((row for row in self.rows if (row["op"], row["shape"]) == (op, shape)), None)
            if row is None:
                row = {**counts(op, shape, first), "competitors": {}}
                row["kernel"] = "native" if backend.use_native(op, self.device) else "reference"
                row["least_us"] = least(first, shape, self.limits) * 1e6
                self.rows.append(row)
            copies = [first]
            if 0 < first.bytes < 3 * self.clock.cache:
                count = min(COPIES, math.ceil(3 * self.clock.cache / first.bytes))
                copies += [build(module, arguments, self.device, seed) for seed in range(1, count)]
            row["input_sets"] = len(copies)
            names = [name for name in first.competitors if (name in cases.COMPILED) == job.compiled]
            competitors = {name: self.enter(op, copies, name) for name in names}
            laps: dict[str, list[dict[str, float]]] = {name: [] for name in competitors}
            for _ in range(cases.LAPS):
                for name, competitor in competitors.items():
                    if "error" not in competitor:
                        laps[name].append(self.lap(competitor))
        for name, competitor in competitors.items():
            row["competitors"][name] = self.figures(first, competitor, laps[name], row["least_us"])
        return {**row, "competitors": {name: row["competitors"][name] for name in names}}

    def enter(self, op: str, copies: list[Case], name: str) -> dict[str, Any]:
        """Check a competitor, warm it up on all inputs, and capture it; an exception is kept in "error"."""
        if name in cases.COMPILED and self.compiling[op] > COMPILING:
            return {"error": "left out: compiling took its time on shapes before"}
        if name in cases.COMPILED and self.device == "cuda" and not find_spec("triton"):
            return {"error": "left out: triton is not installed"}
        calls = [case.competitors[name] for case in copies]
        try:
            begin = time.monotonic()
            copies[0].verify(name)
            self.compiling[op] += (time.monotonic() - begin) * (name in cases.COMPILED)
            for call in calls:
                call()
            self.clock.settle()
            once = max(self.clock.time(calls, 1), 1e-7)
        except Exception as error:  # a competitor that fails is a result
            return {"error": said(error)}
        rounds = max(1, min(1000, round(LAP / once / len(calls))))
        competitor: dict[str, Any] = {"calls": calls, "rounds": rounds}
        try:
            repeats = max(1, min(rounds, 64 // len(calls)))
            replay = self.clock.capture(calls * repeats)
            replay()
            self.clock.settle()
            competitor |= {"replay": replay, "replayed": repeats * len(calls)}
        except Exception as error:
            competitor["no graph"] = said(error)
        return competitor

    def lap(self, competitor: dict[str, Any]) -> dict[str, float]:
        calls, rounds = competitor["calls"], competitor["rounds"]
        times = {"call": self.clock.time(calls, rounds)}
        if "replay" in competitor:
            replays = max(1, rounds * len(calls) // competitor["replayed"])
            times["graph"] = self.clock.time([competitor["replay"]], replays) / competitor["replayed"]
        return times

    def figures(
        self, case: Case, competitor: dict[str, Any], laps: list[dict[str, float]], least_us: float
    ) -> dict[str, Any]:
        if "error" in competitor:
            return {"error": competitor["error"]}
        times = {key: [lap[key] for lap in laps] for key in laps[0]}
        middle = {key: median(of_one) for key, of_one in times.items()}
        seconds = middle.get("graph", middle["call"])
        own = times["graph" if "graph" in times else "call"]
        result = {
            "call_us": middle["call"] * 1e6,
            "graph_us": middle["graph"] * 1e6 if "graph" in middle else None,
            "tflops": case.flops / seconds / 1e12,
            "gbps": case.bytes / seconds / 1e9,
            "of_ceiling": least_us / (seconds * 1e6),
            "spread": (max(own) - min(own)) / median(own),
        }
        return result | ({"no_graph": competitor["no graph"]} if "no graph" in competitor else {})


def said(error: Exception) -> str:
    """An error in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:300]


def measured(timer: Timer, todo: list[Job], seconds: float, out: Path) -> bool:
    """Time job by job; save the report after each.

    True if something was timed, nothing failed and var_ext was right; shapes left out for time are no failure.
    """
    begin = time.monotonic()
    left_out: dict[str, str] = {}
    failed: dict[str, str] = {}
    gc.disable()
    lost = ""  # why the device cannot do more work
    for job in todo:
        if lost:
            failed[str(job)] = lost
        elif time.monotonic() - begin > seconds:
            left_out[str(job)] = f"no time left after {seconds:.0f} s"
        else:
            try:
                print(f"{job}: {line(timer.run(job))}", flush=True)
            except Exception as error:
                failed[str(job)] = said(error)
                print(f"{job}: {said(error)}", flush=True)
            try:
                timer.clock.clear()
            except Exception as error:
                lost = f"the device was lost: {said(error)}"
        report = {"ceilings": timer.limits, "rows": timer.rows, "left_out": left_out, "failed": failed}
        save(out, {**report, "build": _C.build_info()})
    took = time.monotonic() - begin
    print(
        f"{len(timer.rows)} shapes timed in {took:.0f} s; left out for time: {len(left_out)}; failed: {len(failed)}"
    )
    mine = [row["competitors"]["var_ext"] for row in timer.rows if "var_ext" in row["competitors"]]
    return bool(mine) and not failed and not any("error" in figures for figures in mine)


def line(row: dict[str, Any]) -> str:
    """A row in short: microseconds of each competitor."""
    shown = {
        name: figures.get("error") or f"{figures['graph_us'] or figures['call_us']:.1f}"
        for name, figures in row["competitors"].items()
    }
    share = row["competitors"].get("var_ext", {}).get("of_ceiling")
    of = f"; {share:.0%} of the ceiling" if share is not None else ""
    return f"{', '.join(f'{name} {text}' for name, text in shown.items())} us{of}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the figures, as JSON")
    parser.add_argument("--only", default="", help="files whose names contain this")
    parser.add_argument("--seconds", type=float, default=200.0, help="shapes after that are left out")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    out = options.out or Path(os.devnull)
    modules = files(options.only)
    if options.smoke:
        cases.compile_backend = "eager"
        clock = Cpu()
        timer = Timer(clock, "cpu", ceilings(clock, "cpu", 1 << 16, 32))
        shapes = {op: (module, {"smoke": module.SMOKE}) for op, module in modules.items()}
    elif torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False  # the quantizer's convolutions are float32, for everyone
        clock = Gpu()
        with clock.stream():
            timer = Timer(clock, "cuda", ceilings(clock, "cuda", 1 << 30, 8192))
        shapes = {op: (module, module.GPU_SHAPES) for op, module in modules.items()}
    else:
        raise SystemExit("there is no GPU to time on; gpu_plan.py shows what would run")
    return 0 if measured(timer, jobs(shapes), options.seconds, out) else 1


if __name__ == "__main__":
    sys.exit(main())
