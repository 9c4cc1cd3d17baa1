"""Times d16 sampling on a GPU: a call, its parts, its memory, and its most expensive kernels.

    python benchmarks/gpu_sampling.py --out sampling.json [--seconds 80]
    python benchmarks/gpu_sampling.py --smoke --out sampling.json       # a toy on the CPU: the wiring

`make gpu` calls this. Weights are random, 256 px, guidance on, decoder included. "graph" is an ordinary call of
`Sampler`, one captured graph; "eager" is the same engine launch by launch, which shows the parts. Seconds are those of
the whole call with a sync; "gpu" is the time between events around it; "host" the time until the call returns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import flops
import torch
from harness.clock import Watch, clock_of, in_turn
from harness.memory import forget_peak, resident
from harness.report import said, save
from harness.results_page import duration
from samplers import OPTIONS, labels_of, our_model
from torch.profiler import ProfilerActivity, profile

from var_ext.bench import Watched
from var_ext.engine import Call, Draw, SeededDraw
from var_ext.engine.memory import out_of_memory
from var_ext.sampling import Sampler

DEPTH = 16
BATCHES = (1, 8, 50)
PROFILED = (1, 50)
# Lower bounds in milliseconds for an H100: each scale's matmuls at 800 TFLOP/s or its weights at 3.0 TB/s, and the
# decoder; counted with the head on both halves and the published decoder.
LIMITS_MS = {1: 2.4, 8: 10.5, 50: 62.0}
LAPS, KERNELS = 5, 25
PARTS = ("transformer", "draw", "step", "decoder")


class Bench:
    """The figures of one run; written after each.

    Args:
        device: "cuda", or "cpu" for the smoke run.
        seconds: what would start later is left out.
        out: the JSON.
    """

    def __init__(self, device: torch.device, seconds: float, out: Path, *, tiny: bool) -> None:
        self.device, self.seconds, self.out, self.tiny = device, seconds, out, tiny
        self.clock = clock_of(device)
        self.begin = time.monotonic()
        self.report: dict[str, Any] = dict(
            depth=2 if tiny else DEPTH,
            precision="bf16",
            tiny=tiny,
            rows=[],
            profiles=[],
            left_out={},
            failed={},
        )
        self.var = our_model(self.report["depth"], device, tiny)
        self.renew()

    def renew(self) -> None:
        """Frees all graphs and their memory."""
        self.sampler = Sampler(self.var.vae_proxy[0], self.var, precision="bf16")
        self.sampler.engine.parts()
        self.clock.release()

    def figure(self, name: str, take: Callable[[], str]) -> None:
        """Adds a figure, if there is time left."""
        if time.monotonic() - self.begin > self.seconds:
            self.report["left_out"][name] = f"no time left after {self.seconds:.0f} s"
        else:
            try:
                print(f"{name}: {take()}", flush=True)
            except Exception as error:  # the other figures are still possible
                lost = isinstance(error, RuntimeError) and out_of_memory(error)
                self.report["failed"][name] = "out of memory" if lost else said(error)
                print(f"{name}: {self.report['failed'][name]}", flush=True)
        save(self.out, self.report)

    # ------------------------------------------------------------------ calls

    def graph(self, batch: int) -> torch.Tensor:
        """Images of an ordinary call, with labels and seeds in Python."""
        labels = labels_of(batch, torch.device("cpu")).tolist()
        return self.sampler(labels, list(range(batch)), batch_size=batch, **OPTIONS)

    @torch.inference_mode()
    def eager(self, batch: int, watch: Watch | None = None) -> torch.Tensor:
        """The same, launch by launch; `watch` marks `PARTS`, the first three once per scale."""
        engine, seeds = self.sampler.engine, torch.arange(batch, device=self.device)
        call = Call(labels_of(batch, self.device), seeds, self.sampler.options(**OPTIONS))
        draw: Draw = SeededDraw(seeds, call.options, engine.codebook)
        if watch is None:
            return engine.sample(call, draw)[0]
        ends = cycle(("transformer", "draw"))
        f_hats = []
        for f_hat in engine.generate(call, Watched(draw, lambda: watch(next(ends)))):
            watch("step")
            f_hats = [f_hat]
        images = engine.decode(*f_hats)
        watch("decoder")
        return images

    # ------------------------------------------------------------------ figures

    def time(self, batch: int) -> str:
        """Both, alternating."""
        hosts: list[float] = []

        def graph(watch: Watch) -> None:
            begin = time.perf_counter()
            self.graph(batch)
            hosts.append(time.perf_counter() - begin)
            watch("gpu")

        self.renew()
        memory = {"eager": self.memory(self.eager, batch)}
        self.graph(batch)  # the first call of a kind is eager, the second captures
        memory["graph"] = self.memory(self.graph, batch)
        calls: dict[str, Callable[[Watch], Any]] = {"graph": graph, "eager": lambda w: self.eager(batch, w)}
        cost = flops.sampling(self.report["depth"], mixed=True)
        for who, timed in in_turn(calls, LAPS, self.clock).items():
            row = dict(who=who, batch=batch, **timed.as_dict(), memory=memory[who])
            if who == "graph" and timed.seconds:
                row["host"] = median(hosts[1:])  # the first one warms up
            if not self.tiny:
                row |= dict(flops=cost.total * batch, limit_ms=LIMITS_MS.get(batch))
            self.report["rows"].append(row)
        return told(self.report["rows"][-2:])

    def memory(self, draw: Callable[[int], Any], batch: int) -> dict[str, int]:
        """Peak bytes allocated and reserved by torch since a first call began."""
        self.clock.release()
        forget_peak(self.device)
        draw(batch)
        self.clock.wait()
        if self.device.type == "cpu":
            return dict(peak=resident("VmHWM"), reserved=resident("VmHWM"))
        allocated, reserved = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
        return dict(peak=allocated(self.device), reserved=reserved(self.device))

    def profile(self, batch: int) -> str:
        """The kernels of a replayed graph, by total time."""
        self.graph(batch)
        self.clock.wait()
        gpu = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
            begin = time.perf_counter()
            self.graph(batch)
            self.clock.wait()
            seconds = time.perf_counter() - begin
        spent = "self_device_time_total" if gpu else "self_cpu_time_total"
        kernels = [(e.key, e.count, getattr(e, spent) / 1e6) for e in profiler.key_averages()]
        kernels = sorted((k for k in kernels if k[2] > 0), key=lambda kernel: -kernel[2])
        busy = sum(kernel[2] for kernel in kernels)
        rows = [dict(name=name[:160], calls=calls, seconds=took) for name, calls, took in kernels[:KERNELS]]
        ours = sum(took for name, _, took in kernels if "var_ext" in name)
        row = dict(batch=batch, seconds=seconds, busy=busy, launches=sum(k[1] for k in kernels), ours=ours)
        self.report["profiles"].append({**row, "kernels": rows})
        lines = [f"  {duration(r['seconds'])}, {r['calls']} x {r['name'][:90]}" for r in rows[:8]]
        return f"{row['launches']} launches, {duration(busy)} in kernels\n" + "\n".join(lines)


def told(rows: list[dict[str, Any]]) -> str:
    """Rows of one batch in a line."""
    words = []
    for row in rows:
        if row["error"]:
            words.append(f"{row['who']} {row['error']}")
            continue
        parts = {part: sum(seconds) for part, seconds in row["parts"].items() if part in PARTS}
        split = ", ".join(f"{part} {duration(seconds)}" for part, seconds in parts.items())
        of = f" ({split})" if split else ""
        words.append(
            f"{row['who']} {duration(median(row['seconds']))}{of}, {row['memory']['peak'] / 1e9:.2f} GB"
        )
    limit = rows[0].get("limit_ms")
    return "; ".join(words) + (f"; {limit} ms at least on an H100" if limit else "")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=80.0, help="figures after that are left out")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if not (options.smoke or torch.cuda.is_available()):
        raise SystemExit("there is no GPU to draw on; --smoke draws with a toy on the CPU")
    device = torch.device("cpu" if options.smoke else "cuda")
    bench = Bench(device, options.seconds, options.out, tiny=options.smoke)
    batches, profiled = ((1, 2), (1,)) if options.smoke else (BATCHES, PROFILED)
    for batch in batches:
        bench.figure(f"batch {batch}", lambda batch=batch: bench.time(batch))
    for batch in profiled:
        bench.figure(f"kernels at batch {batch}", lambda batch=batch: bench.profile(batch))
    return 0 if bench.report["rows"] and not bench.report["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
