"""Result files, complete at any moment, and what was measured on what."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent.parent
ROOT = FOLDER.parent
Report = Mapping[str, Any]
_load = os.getloadavg()[0]  # before the run: the load of the machine


# ---------------------------------------------------------------------- files


def save(path: Path, report: Report) -> None:
    """Replaces the file with JSON atomically: a reader finds the previous report or this one, never half of one."""
    if path.exists() and not path.is_file():  # as /dev/null
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote there, or nothing."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def newest(folder: Path, key: Callable[[Report], Any]) -> dict[Any, Report]:
    """The last result of each kind, oldest first: of those with the same key."""
    latest: dict[Any, Report] = {}
    reports = [load(path) for path in sorted(folder.glob("*.json"))]
    for report in sorted(reports, key=lambda report: report["about"]["date"]):
        latest.pop(key(report), None)
        latest[key(report)] = report
    return latest


# ---------------------------------------------------------------------- what was measured


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


def machine(device: torch.device, **more: Any) -> dict[str, Any]:
    """The chip and its software, the commit and the date."""
    changes = output_of("git", "status", "--porcelain", "--", "csrc", "var_ext", "benchmarks/*.py")
    return dict(
        chip=chip(device),
        threads=torch.get_num_threads(),
        load=round(_load, 1),
        torch=torch.__version__,
        python=platform.python_version(),
        commit=os.environ.get("VAR_EXT_COMMIT") or output_of("git", "rev-parse", "HEAD"),
        dirty=None if changes is None else bool(changes),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **more,
    )


def facts(device: torch.device, **more: Any) -> dict[str, Any]:
    """The same, and the build of var_ext, which `make gpu` has not got when it asks for `machine`."""
    import var_ext
    from var_ext import _C

    version = f"{var_ext.__version__} ({_C.build_info()['compiler']}, {_C.isa()})"
    return machine(device, var_ext=version, **more)


def slug(about: Report) -> str:
    """The chip in a file's name: amd-epyc-2-cores."""
    return re.sub(r"[^a-z0-9]+", "-", about["chip"].lower().removeprefix("nvidia ")).strip("-")


def commit_of(about: Report) -> str:
    """The commit in a file's name."""
    return (about["commit"] or "unknown")[:12] + ("-dirty" if about["dirty"] else "")


def said(error: Exception) -> str:
    """An error in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:300]
