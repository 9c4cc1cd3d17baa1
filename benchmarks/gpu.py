"""The hardware command: builds for the GPU at hand, tests, sanitizes, races, and writes one result file.

    make gpu                          # or: python benchmarks/gpu.py [--results DIR]
    make gpu DRY=1                    # without a GPU: build, collect tests, show the plan, race tiny shapes on the CPU

It takes the Python that runs it with the torch that is there, and needs no network: pip, pybind11, scikit-build-core,
CMake, ninja, pytest and nvcc must be installed. The file is benchmarks/results/CHIP-ARCHITECTURE-COMMIT.json, written
anew after each step; the exit status is 0 if every step passed. VAR_EXT_COMMIT names the commit of a tree without .git.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "gpu"
PYTHON = PLACE / "venv" / "bin" / "python"
BUDGET = (
    470.0  # seconds for everything; a step gets what the steps before have left, and its own share at most
)
SHARES = {
    "build": 270.0,
    "tests": 150.0,
    "races": 220.0,
    "memcheck": 50.0,
    "racecheck": 40.0,
    "initcheck": 20.0,
}
DRY = 3600.0  # seconds for a step of a dry run: it may have two cores, and nobody's GPU waits
SANITIZERS = {
    "memcheck": "2",
    "racecheck": "1",
    "initcheck": "1",
}  # cases of each test: they make it 100 times slower
_begin = time.monotonic()


def left() -> float:
    """Seconds until all should be done."""
    return BUDGET - (time.monotonic() - _begin)


def run(name: str, command: Sequence[object], **environment: str) -> dict[str, Any]:
    """A step of the report. Its end is shown, and kept."""
    seconds = max(5.0, min(SHARES.get(name, 60.0), left())) if torch.cuda.is_available() else DRY
    words = [str(word) for word in command]
    print(f"\n== {name}, {seconds:.0f} s at most\n$ {' '.join(words)}", flush=True)
    # the pins of `make` are those of another environment
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    begin = time.monotonic()
    try:
        child = subprocess.Popen(
            words, cwd=ROOT, env={**inherited, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return dict(ok=False, status=str(error), seconds=0.0, end="")
    try:
        text = child.communicate(timeout=seconds)[0]
        status = str(child.returncode)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # with its own children: they would keep the GPU
        text = child.communicate()[0]
        status = f"stopped after {seconds:.0f} s"
    took = time.monotonic() - begin
    print(f"{text[-3000:]}\n-- {name}: status {status}, {took:.1f} s", flush=True)
    return dict(ok=status == "0", status=status, seconds=round(took, 1), end=text[-3000:])


def architecture() -> str:
    """The target of the chip at hand; that of an H100 where there is none."""
    if not torch.cuda.is_available():
        return "90a"
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major == 9 else ''}"


def output_of(*command: str) -> str | None:
    """What a program says; None if it is not there or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def digest() -> str:
    """Of all sources of kernels: tells two results apart where no commit can."""
    total = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def facts() -> dict[str, Any]:
    there = torch.cuda.is_available()
    changes = output_of("git", "status", "--porcelain")
    properties = torch.cuda.get_device_properties(0) if there else None
    return dict(
        chip=torch.cuda.get_device_name() if there else "no GPU",
        architecture=f"sm_{architecture()}",
        multiprocessors=properties.multi_processor_count if properties else 0,
        memory=properties.total_memory if properties else 0,
        driver=output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        cuda=torch.version.cuda,
        nvcc=next(iter(re.findall(r"release ([\d.]+)", output_of("nvcc", "--version") or "")), None),
        torch=torch.__version__,
        triton=bool(find_spec("triton")),
        flash_attn=bool(find_spec("flash_attn")),
        python=platform.python_version(),
        commit=os.environ.get("VAR_EXT_COMMIT") or output_of("git", "rev-parse", "HEAD"),
        dirty=None if changes is None else bool(changes),
        sources=digest(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def name_of(about: Mapping[str, Any]) -> str:
    """The result file: h100-80gb-hbm3-sm_90a-0123456789ab.json."""
    chip = re.sub(r"[^a-z0-9]+", "-", about["chip"].lower().removeprefix("nvidia ")).strip("-")
    changed = "-dirty" if about["dirty"] else ""
    return f"{chip}-{about['architecture']}-{(about['commit'] or 'unknown')[:12]}{changed}.json"


def build() -> dict[str, Any]:
    """The extension for one chip, in an environment of its own that sees the packages of the active one.

    Not by PYTHONPATH: an editable var_ext of the active environment would win over it.
    """
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    made = run("environment", [sys.executable, "-m", "venv", "--without-pip", PYTHON.parents[1]])
    if not made["ok"]:
        return made
    (packages,) = PYTHON.parents[1].glob("lib/python*/site-packages")
    (packages / "active.pth").write_text("".join(f"{p}\n" for p in sys.path if p.endswith("-packages")))
    settings = {"VAR_EXT_CUDA": "ON", "CMAKE_CUDA_ARCHITECTURES": f"{architecture()}-real"}
    command = [PYTHON, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"]
    for key, value in settings.items():
        command += ["-C", f"cmake.define.{key}={value}"]
    return run("build", [*command, "-C", f"build-dir={PLACE / 'build'}", "--editable", ROOT])


def tests() -> dict[str, Any]:
    """The tests of the kernels, on hardware: how many, which were left out and why, which failed."""
    file = PLACE / "tests.xml"
    # several processes, where pytest-xdist is there: float64 on the CPU takes longer than the kernels
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={file}", *workers]
    step = run("tests", [*command, "tests/cuda", "-k", "hardware"], VAR_EXT_GPU_TESTS="hardware")
    cases = list(ElementTree.parse(file).iter("testcase")) if file.exists() else []
    skipped = {case.get("name", ""): node.get("message") for case in cases for node in case.iter("skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    ran = len(cases) - len(skipped)
    return {**step, "ok": step["ok"] and ran > 0, "ran": ran, "skipped": skipped, "failed": failed}


def races(out: Path, *options: str) -> dict[str, Any]:
    """The benchmarks; what was timed before a failure counts."""
    command = [PYTHON, "benchmarks/gpu_races.py", "--out", out, *options]
    step = run("races", command)
    return {**step, **(json.loads(out.read_text(encoding="utf-8")) if out.exists() else {})}


def sanitize(name: str) -> dict[str, Any]:
    """A tool of compute-sanitizer over a few cases of each test, on kernels of this project alone."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return dict(ok=False, status="not run: compute-sanitizer is not installed")
    command = [tool, "--tool", name, "--error-exitcode", "9"]
    if name == "memcheck":
        command += ["--report-api-errors", "no"]  # torch tries out what the driver has
    if "--kernel-regex" in (output_of(tool, "--help") or ""):
        command += ["--kernel-regex", "kns=var_ext"]
    # without torch's own pool of memory an access beyond a tensor shows; but no graph can be captured then
    small = "hardware and not graph and not registration and not large and not long and not 680"
    pytest = [PYTHON, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/cuda", "-k", small]
    step = run(
        name, [*command, *pytest], VAR_EXT_GPU_TESTS="hardware", VAR_EXT_GPU_CASES=SANITIZERS[name],
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )  # fmt: skip
    # a tool that could not work on this device must not count as one that found nothing
    summary = re.findall(r"={5,} ((?:ERROR|RACECHECK) SUMMARY: .*)", step["end"])
    return {**step, "ok": step["ok"] and bool(summary), "summary": summary[-1] if summary else None}


def passed(report: Mapping[str, Any]) -> bool:
    """Whether every step was run and passed."""
    return all(report.get(name, {}).get("ok") for name in SHARES)


def dry() -> int:
    """As far as it goes without a GPU; no result file."""
    collect = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda", "--collect-only"]
    steps = {"build": build()}
    if steps["build"]["ok"]:
        steps["tests"] = run("tests", [*collect, "-k", "hardware"], VAR_EXT_GPU_TESTS="hardware")
        steps["plan"] = run("plan", [PYTHON, "benchmarks/gpu_races.py", "--plan"])
        steps["races"] = races(PLACE / "races.json", "--smoke")
    print("\nDRY: nothing ran on a GPU, no result file.")
    for name, step in steps.items():
        print(f"  {name}: {'passed' if step['ok'] else 'FAILED'}, {step['seconds']:.1f} s")
    return int(not all(step["ok"] for step in steps.values()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result file"
    )
    parser.add_argument(
        "--dry", action="store_true", help="without a GPU: build, collect tests, show the plan"
    )
    options = parser.parse_args()
    if options.dry:
        return dry()
    if not torch.cuda.is_available():
        print(
            "There is no GPU, or this torch cannot use it; `make gpu DRY=1` goes as far as it can.",
            file=sys.stderr,
        )
        return 1
    about = facts()
    print(json.dumps(about, indent=1))
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / name_of(about)
    report: dict[str, Any] = dict(about=about)

    def keep(name: str, step: dict[str, Any]) -> None:
        report[name] = step
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    keep("build", build())
    if report["build"]["ok"]:
        keep("tests", tests())
        spare = left() - sum(SHARES[name] for name in SANITIZERS)
        timing = max(10.0, min(spare, SHARES["races"]) - 20)  # a race under way may end
        keep("races", races(PLACE / "races.json", "--seconds", f"{timing:.0f}"))
        for name in SANITIZERS:
            keep(name, sanitize(name))
    for name in SHARES:
        step = report.get(name, {})
        print(f"  {name}: {'passed' if step.get('ok') else 'FAILED'}, {step.get('status', 'not run')}")
    print(f"wrote {file} after {BUDGET - left():.0f} s; {'passed' if passed(report) else 'FAILED: read it'}")
    return int(not passed(report))


if __name__ == "__main__":
    sys.exit(main())
