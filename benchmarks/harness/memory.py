"""Bytes that a competitor takes: of this process, or of a fresh one, for one cannot separate two competitors."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.report import ROOT
from var_ext.engine.memory import out_of_memory


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


def memory_of(draw: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Bytes that a loaded competitor takes: `peak` over two draws, the first of which may prepare weights; `resting`
    between them; or an `error`. On the CPU of the whole process, torch and Python included; on a GPU what torch has
    allocated.
    """
    gpu = device.type == "cuda"
    gc.collect()
    forget_peak(device)
    try:
        draw()
        gc.collect()
        resting = torch.cuda.memory_allocated(device) if gpu else resident()
        draw()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return dict(error="out of memory")
    return dict(peak=torch.cuda.max_memory_allocated(device) if gpu else resident("VmHWM"), resting=resting)


def in_fresh_process(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What `script` prints as JSON on its last line."""
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return dict(error=(done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    return dict(json.loads(lines[-1]))
