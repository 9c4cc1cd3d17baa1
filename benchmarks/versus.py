"""Shared by the comparisons with other programs: laps, parts of a run, memory, result files."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from result_files import save
from torch import nn

import var_ext
from var_ext import _C
from var_ext.bench import psnr
from var_ext.engine.memory import out_of_memory

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results" / "versus"
_load = os.getloadavg()[0]  # before the run: the load of the machine


class Watch:
    """Marks the ends of the parts of a run: on a GPU by events in its stream, without a sync."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __call__(self, part: str) -> None:
        """`part` ends here; it began at the previous mark."""
        self.marks.append((part, self._now()))

    def parts(self) -> dict[str, list[float]]:
        """Seconds of each part, one value per mark."""
        synchronize(self.device)
        seconds: dict[str, list[float]] = {}
        for (_, begin), (part, end) in zip(self.marks, self.marks[1:], strict=False):
            took = end - begin if self.device.type == "cpu" else begin.elapsed_time(end) / 1e3
            seconds.setdefault(part, []).append(took)
        return seconds


@dataclass
class Timed:
    """Laps of one competitor: seconds of each, its parts, or the reason why there are none."""

    seconds: list[float] = field(default_factory=list)
    laps: list[dict[str, list[float]]] = field(default_factory=list)
    error: str | None = None

    def parts(self) -> dict[str, list[float]]:
        """The median over laps of each part, place by place."""
        return {
            part: [median(column) for column in zip(*(lap[part] for lap in self.laps), strict=True)]
            for part in (self.laps[0] if self.laps else ())
        }

    def as_dict(self) -> dict[str, Any]:
        return dict(seconds=self.seconds, parts=self.parts(), error=self.error)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Frees unused memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def time_in_turn(
    competitors: Mapping[str, Callable[[Watch], Any]], laps: int, device: torch.device
) -> dict[str, Timed]:
    """Each competitor once to warm up, then all in turn, lap after lap; each lap begins with the next one.

    One that runs out of memory is dropped; the others go on.
    """
    results = {name: Timed() for name in competitors}
    names = list(competitors)
    for lap in range(-1, laps):
        first = max(lap, 0) % len(names)
        for name in names[first:] + names[:first]:
            timed = results[name]
            if timed.error:
                continue
            try:
                synchronize(device)
                begin, watch = time.perf_counter(), Watch(device)
                competitors[name](watch)
                synchronize(device)
                seconds, parts = time.perf_counter() - begin, watch.parts()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                timed.error = "out of memory"
                release(device)
                continue
            if lap >= 0:
                timed.seconds.append(seconds)
                timed.laps.append(parts)
    return results


# ---------------------------------------------------------------------- memory


def resident(what: str = "VmRSS") -> int:
    """Bytes of this process: VmRSS now, VmHWM the peak since it began or since `forget_peak`.

    Not getrusage's ru_maxrss, in which a child process has inherited the peak of its parent.
    """
    (kilobytes,) = re.findall(rf"^{what}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kilobytes) * 1024


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def memory_of(draw: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """Bytes that a loaded competitor takes: `peak` over two draws, the first of which may prepare weights; `resting`
    between them. On the CPU of the whole process, torch and Python included; on a GPU what torch has allocated.
    """
    gc.collect()
    forget_peak(device)
    draw()
    gc.collect()
    resting = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident()
    draw()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")
    return dict(peak=peak, resting=resting)


def in_fresh_process(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What `script` prints as JSON on its last line: one process cannot separate the memory of two competitors."""
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return dict(error=(done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    return dict(json.loads(lines[-1]))


# ---------------------------------------------------------------------- models


@torch.no_grad()
def randomize(vae: nn.Module, var: nn.Module, seed: int = 0) -> None:
    """Non-trivial weights for either implementation: logits that prefer some codes, open gates, pixels with
    contrast. `var` comes with its own initialisation, the tokenizer with any.
    """
    torch.manual_seed(seed)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm | nn.Embedding):
            module.reset_parameters()
    nn.init.normal_(var.class_emb.weight)  # its initialisation would leave the gates almost closed
    nn.init.normal_(var.head.weight, std=2 / var.head.in_features**0.5)
    device, channels = var.head.weight.device, vae.quantize.embedding.weight.shape[1]
    f_hat = 2 * torch.randn(1, channels, 16, 16).to(device)
    last = vae.decoder.conv_out
    contrast = vae.decoder(vae.post_quant_conv(f_hat)).std()
    last.weight.mul_(0.5 / contrast)
    last.bias.zero_()


def finite_psnr(images: torch.Tensor, expected: torch.Tensor) -> float:
    """`var_ext.bench.psnr`, at most 200: JSON has no infinity."""
    return min(200.0, psnr(images.double(), expected.double()))


# ---------------------------------------------------------------------- results


def output_of(*command: str) -> str | None:
    """The output of a program; None if it is missing or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def chip(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = re.findall(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def about(device: torch.device, **more: Any) -> dict[str, Any]:
    """What was measured, on what, with what."""
    changes = output_of("git", "status", "--porcelain", "--", "csrc", "var_ext", "benchmarks/*.py")
    build = _C.build_info()
    return dict(
        chip=chip(device),
        threads=torch.get_num_threads(),
        load=round(_load, 1),
        torch=torch.__version__,
        python=platform.python_version(),
        var_ext=f"{var_ext.__version__} ({build['compiler']}, {_C.isa()})",
        commit=os.environ.get("VAR_EXT_COMMIT") or output_of("git", "rev-parse", "HEAD"),
        dirty=None if changes is None else bool(changes),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **more,
    )


def add_file_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        type=Path,
        help="the result file; else one in --folder, named after the program and the chip",
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the result file")


def write(kind: str, report: Mapping[str, Any], options: argparse.Namespace, *, finished: bool) -> None:
    """The result file: benchmarks/results/versus/official-amd-epyc-2-cores.json, of the last run on a chip.

    Written as figures arrive, so that a stopped run keeps them; `finished` says whether it is complete.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", report["about"]["chip"].lower().removeprefix("nvidia ")).strip("-")
    path = options.json or options.folder / f"{kind}-{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, {"kind": kind, **report, "finished": finished})
    if finished:
        print(f"wrote {path}; the page: python benchmarks/versus_page.py")


def numbers(text: str) -> list[int]:
    """1,8 -> [1, 8]"""
    return [int(part) for part in text.split(",")]


def words(text: str) -> list[str]:
    """fp32,bf16 -> ["fp32", "bf16"]"""
    return text.split(",")
