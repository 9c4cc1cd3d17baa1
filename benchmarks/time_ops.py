"""Times the benchmark files: each shape of each op, its competitors in turns, beside what the machine can do at best.

    python benchmarks/time_ops.py [--only adaln]     # `make bench`: on the CPU; writes results/ops and RESULTS.md
    python benchmarks/time_ops.py --device cuda --out op_times.json [--seconds 200]     # `make gpu` calls this
    python benchmarks/time_ops.py --plan             # shapes for a GPU and lower bounds for an H100; times nothing
    python benchmarks/time_ops.py --smoke --out op_times.json     # each file's smallest shape, on the CPU: the wiring

Every competitor is checked against the reference first. On the CPU a figure is the median over laps of each lap's
median; on a GPU it is the median over laps on the GPU's own clock, every op's first shape comes before any second one,
and competitors that compile are timed last, apart. Two figures of each there: "call", one of many calls from Python,
launches included; "graph", the same calls replayed from a CUDA graph if one can be captured, the GPU's time alone.
Inputs that would stay in the L2 cache are rotated with other sets. Shapes left out for time are listed and are no
failure.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import ops_page
import torch
from harness import case as cases
from harness.case import Case
from harness.clock import Clock, Cuda, Rehearsal, Watch, clock_of, in_turn
from harness.jobs import Job, build, counts, files, jobs, least, show_plan
from harness.report import FOLDER, Report, commit_of, facts, said, save, slug
from harness.results_page import rewrite

from var_ext import _C, backend, ops

COMPILING = 12.0  # seconds a file's competitors may spend compiling on a GPU; later shapes leave them out
COPIES = 48  # sets of inputs at most


def ceilings(clock: Clock, size: int, side: int) -> dict[str, float]:
    """Bytes a second of a large copy, FLOP a second of large matmuls, on random numbers."""
    source = torch.randn(size // 4, device=clock.device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name in kinds if isinstance(clock, Cuda) else ("bf16", "fp32"):
        a, b = torch.randn(2, side, side, device=clock.device).to(kinds[name])
        calls[name] = lambda a=a, b=b: torch.mm(a, b)  # type: ignore[misc]
    laps = {name: lap_of([call] * 3, 1, clock) for name, call in calls.items()}
    times = {name: median(map(median, timed)) for name, timed in raced(laps, 5, clock).items()}
    return {name: (2 * size if name == "copy" else 2 * side**3) / took for name, took in times.items()}


def lap_of(calls: list[Callable[[], Any]], rounds: int, clock: Clock) -> tuple[Callable[[Watch], None], int]:
    """A lap for `raced`: so many rounds of calls, and how many of them a mark stands for."""

    def lap(watch: Watch) -> None:
        for _ in range(rounds):
            for call in calls:
                call()
                if clock.singly:
                    watch("call")
        if not clock.singly:
            watch("call")

    return lap, 1 if clock.singly else rounds * len(calls)


Laps = dict[Any, tuple[Callable[[Watch], None], int]]


def raced(laps: Laps, count: int, clock: Clock, *, warm: bool = False) -> dict[Any, list[list[float]]]:
    """Competitor -> seconds of its calls in each lap, or of a call in the mean where they are not timed singly."""
    timed = in_turn({name: lap for name, (lap, _) in laps.items()}, count, clock, warm=warm)
    if lost := [str(name) for name, result in timed.items() if result.error]:
        raise RuntimeError(f"out of memory: {', '.join(lost)}")
    return {
        name: [[seconds / laps[name][1] for seconds in lap["call"]] for lap in result.laps]
        for name, result in timed.items()
    }


class Timer:
    """The rows of one run.

    Args:
        clock: times calls.
        rates: what `ceilings` found.
    """

    def __init__(self, clock: Clock, rates: dict[str, float]) -> None:
        self.clock, self.ceilings, self.gpu = clock, rates, isinstance(clock, Cuda)
        self.rates = rates | ({"tensor": rates["bf16"]} if self.gpu else {})
        self.rows: list[dict[str, Any]] = []
        self.compiling: defaultdict[str, float] = defaultdict(float)  # op -> seconds that compilers took

    def run(self, job: Job) -> dict[str, Any]:
        """Check and time the competitors of a job, and keep them in the row of their shape."""
        with self.clock.stream():
            first = build(job.module, job.arguments, self.clock.device)
            copies = [first]
            if 0 < first.bytes < 3 * self.clock.cache:
                seeds = range(1, min(COPIES, math.ceil(3 * self.clock.cache / first.bytes)))
                copies += [build(job.module, job.arguments, self.clock.device, seed) for seed in seeds]
            laps: Laps = {}
            figures = {
                name: self.enter(job.op, copies, name, laps) for name in first.competitors if job.takes(name)
            }
            times = raced(laps, 1 if self.clock.brief else first.laps, self.clock, warm=True)
        row = next((row for row in self.rows if (row["op"], row["shape"]) == (job.op, job.shape)), None)
        if row is None:
            native = job.op in ops.__all__ and backend.use_native(job.op, self.clock.device.type)
            row = {**counts(job.op, job.shape, first), "kernel": "native" if native else "reference"}
            row |= {
                "least_us": least(first, job.shape, self.rates) * 1e6,
                "input_sets": len(copies),
                "competitors": {},
            }
            self.rows.append(row)
        for name, found in figures.items():
            if "error" not in found:
                ways = {way: times[name, way] for way in ("call", "graph") if (name, way) in times}
                found |= figures_of(first, ways, row["least_us"])
        row["competitors"] |= figures
        return {**row, "competitors": figures}

    def enter(self, op: str, copies: list[Case], name: str, laps: Laps) -> dict[str, Any]:
        """Check a competitor, warm it up on all inputs, and add its laps; returns why any are missing."""
        compiles = name in cases.COMPILED and self.gpu
        if compiles and self.compiling[op] > COMPILING:
            return {"error": "left out: compiling took its time on shapes before"}
        if compiles and not find_spec("triton"):
            return {"error": "left out: triton is not installed"}
        calls = [case.competitors[name] for case in copies]
        try:
            begin = time.monotonic()
            copies[0].verify(name)
            self.compiling[op] += (time.monotonic() - begin) * compiles
            for call in calls:
                call()
            self.clock.wait()
            once = max(self.clock.seconds(lambda: [call() for call in calls]), 1e-7)
        except Exception as error:  # a competitor that fails is a result
            return {"error": said(error)}
        rounds = 1 if self.clock.brief else max(1, round((copies[0].lap or self.clock.lap) / once))
        laps[name, "call"] = lap_of(calls, rounds, self.clock)
        repeats = max(1, min(rounds, 64 // len(calls)))
        try:
            replay = self.clock.capture(calls * repeats)
            if replay is not None:
                replay()
                self.clock.wait()
                lap, count = lap_of([replay], max(1, rounds // repeats), self.clock)
                laps[name, "graph"] = lap, count * repeats * len(calls)
        except Exception as error:
            return {"no_graph": said(error)}
        return {}


def figures_of(case: Case, ways: dict[str, list[list[float]]], least_us: float) -> dict[str, Any]:
    """What is reported of a competitor; the GPU's time alone decides where there is one."""
    medians = {way: [median(lap) for lap in laps] for way, laps in ways.items()}
    middle = {way: median(laps) for way, laps in medians.items()}
    own = medians.get("graph", medians["call"])
    seconds = median(own)
    return {
        "call_us": middle["call"] * 1e6,
        "graph_us": middle["graph"] * 1e6 if "graph" in middle else None,
        "tflops": case.flops / seconds / 1e12,
        "gbps": case.bytes / seconds / 1e9,
        "of_ceiling": least_us / (seconds * 1e6),
        "spread": (max(own) - min(own)) / seconds,
    }


def measured(timer: Timer, todo: list[Job], seconds: float, out: Path, **known: Any) -> bool:
    """Time job by job; save the report after each.

    True if something was timed, nothing failed and no competitor that compiles nothing did; shapes left out for time
    are no failure.
    """
    begin = time.monotonic()
    left_out: dict[str, str] = {}
    failed: dict[str, str] = {}
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
                timer.clock.release()
            except Exception as error:
                lost = f"the device was lost: {said(error)}"
        report = {
            **known,
            "ceilings": timer.ceilings,
            "rows": timer.rows,
            "left_out": left_out,
            "failed": failed,
        }
        save(out, report)
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
    of = f"; {share:.0%} of the ceiling" if share else ""
    return f"{', '.join(f'{name} {text}' for name, text in shown.items())} us{of}"


def kept_in(about: Report, only: str) -> Path:
    """The file of a run: of its own for some of the ops, so that a run of others does not replace it."""
    return (
        FOLDER / "results" / "ops" / ("-".join(filter(None, (slug(about), commit_of(about), only))) + ".json")
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--out", type=Path, help="the figures, as JSON; else a file of the chip and commit, and the page"
    )
    parser.add_argument("--only", default="", help="files whose names contain this")
    parser.add_argument("--seconds", type=float, default=math.inf, help="shapes after that are left out")
    parser.add_argument("--smoke", action="store_true", help="each competitor on a tiny shape, on the CPU")
    parser.add_argument("--plan", action="store_true", help="shows the shapes for a GPU, and times nothing")
    options = parser.parse_args()
    if options.plan:
        show_plan(options.only)
        return 0
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise SystemExit("there is no GPU to time on; --plan shows what would run")
    device, modules = torch.device(options.device), files(options.only)
    if not modules:
        raise SystemExit(f"no benchmark file has {options.only!r} in its name")
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as this process may use
    about = facts(device)
    torch.backends.cudnn.allow_tf32 = False  # the quantizer's convolutions are float32, for everyone
    clock = Rehearsal(device) if options.smoke else clock_of(device)
    size, side = (1 << 16, 32) if options.smoke else (1 << 30, 8192) if gpu else (1 << 28, 2048)
    if options.smoke:
        cases.compile_backend = "eager"
    wanted = "SMOKE" if options.smoke else "GPU_SHAPES" if gpu else "SHAPES"
    shapes = {
        name: (file, {"smoke": file.SMOKE} if options.smoke else getattr(file, wanted))
        for name, file in modules.items()
        if hasattr(file, wanted)
    }
    with clock.stream():
        timer = Timer(clock, ceilings(clock, size, side))
    todo = jobs(shapes, apart=gpu or options.smoke)
    out = options.out or kept_in(about, options.only)
    good = measured(timer, todo, options.seconds, out, about=about, build=_C.build_info())
    if not (options.out or options.smoke):
        rewrite(ops_page.section())
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
