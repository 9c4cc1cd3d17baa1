"""The steps of the hardware command: what each runs, how long it may take, and what it adds to the report.

gpu.py decides which run in parallel, and in which order.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from gpu_runner import Result, Step
from harness.report import ROOT, output_of

PLACE = ROOT / "build" / "gpu"
PYTHON = PLACE / "venv" / "bin" / "python"
SHARES = {  # seconds of each step of `make gpu`
    "build": 240.0, "tests": 150.0, "memcheck": 120.0, "racecheck": 120.0, "initcheck": 120.0, "ptx": 120.0,
    "occupancy": 60.0, "sampling": 90.0, "op_times": 420.0,
}  # fmt: skip
VERSUS = {"build": SHARES["build"], "official": 220.0, "dit": 240.0}  # of `make gpu-versus`
# Cases of each test: under the tools they are 100 times slower.
SANITIZERS = {"memcheck": "2", "racecheck": "1", "initcheck": "1"}
ENDING = 25.0  # last seconds of a sanitizer's share, in which no test starts: the running one ends, the tool reports
# For each process of the parallel steps, which are as many as the cores.
THREADS = {"OMP_NUM_THREADS": "1"}
# The tools run without torch's caching allocator, so no graph can be captured.
SMALL = "hardware and not graph and not registration and not large and not long and not 680 and not device"


def environment() -> None:
    """An interpreter for the build that sees the packages of the active one.

    PYTHONPATH would not do: an editable var_ext of the active environment would take precedence.
    """
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", PYTHON.parents[1]], check=True)
    (packages,) = PYTHON.parents[1].glob("lib/python*/site-packages")
    (packages / "active.pth").write_text("".join(f"{p}\n" for p in sys.path if p.endswith("-packages")))


def build(architecture: str) -> Step:
    """The extension for one chip, with its PTX, which takes nvcc two fifths longer: one step runs only that.

    Args:
        architecture: "90a".
    """
    virtual = architecture.rstrip("a")
    settings = {
        "VAR_EXT_CUDA": "ON",
        "CMAKE_CUDA_ARCHITECTURES": f"{architecture}-real;{virtual}-virtual",
    }
    command = [PYTHON, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"]
    for key, value in settings.items():
        command += [f"--config-settings=cmake.define.{key}={value}"]
    command += [f"--config-settings=build-dir={PLACE / 'build'}", "--editable", ROOT]
    return Step(command, SHARES["build"])


# ---------------------------------------------------------------------- tests


def pytest(*arguments: object) -> list[object]:
    return [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def tests() -> Step:
    """The kernel tests on hardware: how many ran, which were skipped and why, which failed."""
    # several processes if pytest-xdist is installed: float64 on the CPU takes longer than the kernels
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    return _tested("tests", "tests/cuda", "-k", "hardware", *workers)


def ptx() -> Step:
    """The driver compiles the PTX and runs a few of its kernels, as a newer chip would."""
    only = dict(CUDA_FORCE_PTX_JIT="1", CUDA_CACHE_DISABLE="1")
    return _tested("ptx", "tests/cuda/test_ptx.py", "-k", "hardware", **only)


def _tested(name: str, *arguments: object, **variables: str) -> Step:
    file = PLACE / f"{name}.xml"
    command = pytest(f"--junitxml={file}", *arguments)
    variables |= dict(VAR_EXT_GPU_TESTS="hardware", **THREADS)
    return Step(command, SHARES[name], variables, read=functools.partial(_counted, file))


def _counted(file: Path, step: Result, text: str) -> Result:
    cases = list(ElementTree.parse(file).iter("testcase")) if file.exists() else []
    skipped = {case.get("name", ""): node.get("message") for case in cases for node in case.iter("skipped")}
    failed = {
        f"{case.get('classname')}::{case.get('name')}": (node.get("message") or "")[:300]
        for case in cases
        for node in [*case.iter("failure"), *case.iter("error")]
    }
    ran = len(cases) - len(skipped)
    return dict(ok=step["ok"] and ran > 0, ran=ran, skipped=skipped, failed=failed)


# ---------------------------------------------------------------------- sanitizers


def sanitizer(name: str) -> Step:
    """A tool of compute-sanitizer over a few cases of each test; tests out of time count as skipped."""
    program = "compute-sanitizer"
    tool = shutil.which(program) or shutil.which(program, path="/usr/local/cuda/bin") or program
    command: list[object] = [tool, "--tool", name]
    if name == "memcheck":
        command += ["--report-api-errors", "no"]  # torch probes the driver's features
    # initcheck must see torch's writes as well, or it would report reads of uninitialised memory
    if name != "initcheck" and "--kernel-regex" in (output_of(tool, "--help") or ""):
        command += ["--kernel-regex", "kns=var_ext"]
    # without torch's caching allocator an access beyond a tensor is detected
    variables = dict(
        VAR_EXT_GPU_TESTS="hardware", VAR_EXT_GPU_CASES=SANITIZERS[name], PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )
    variables |= dict(VAR_EXT_GPU_SECONDS=f"{SHARES[name] - ENDING:.0f}", **THREADS)
    file = PLACE / f"{name}.xml"
    command += pytest("-x", f"--junitxml={file}", "tests/cuda", "-k", SMALL)

    def read(step: Result, text: str) -> Result:
        tested = _counted(file, step, text)
        return {**tested, **looked(name, tested, text)}

    return Step(command, SHARES[name], variables, read=read)


def looked(name: str, step: Result, text: str) -> Result:
    """The report of a tool. One that could not work on this device must not count as one that found nothing.

    Findings of initcheck in torch's own kernels are listed but are no failure.
    """
    found = re.findall(r"={5,} +(?:.* access )?at (?:0x\w+ in )?(?:void )?(\S[^\n]*)", text)
    names = [re.split(r"[<(+]", place.replace("(anonymous namespace)::", ""))[0].strip() for place in found]
    places = Counter(names)
    summary = re.findall(r"={5,} ((?:ERROR|RACECHECK) SUMMARY: .*)", text)
    clean = bool(summary) and re.search(r": 0 (?:errors|hazards)", summary[-1]) is not None
    of_others = bool(summary and names) and not any("var_ext" in name for name in names)
    blameless = clean or (name == "initcheck" and of_others)
    return dict(ok=step["ok"] and blameless, summary=summary[-1] if summary else None, places=dict(places))


def collected(name: str) -> Step:
    """Only collects the tests of a step: what is possible without a GPU."""
    whole = {"tests": tests, "ptx": ptx}[name]() if name not in SANITIZERS else sanitizer(name)
    command = [*whole.command[whole.command.index(PYTHON) :], "--collect-only"]
    return Step(command, whole.seconds, whole.environment)


# ---------------------------------------------------------------------- programs that write JSON


def _writing(name: str, program: str, out: Path, *options: object) -> Step:
    """A program of this folder; output before a failure counts."""
    return Step([PYTHON, f"benchmarks/{program}", "--out", out, *options], SHARES[name], figures=out)


def occupancy(*options: object) -> Step:
    return _writing("occupancy", "gpu_occupancy.py", PLACE / "occupancy.json", *options)


def sampling(*options: object) -> Step:
    return _writing("sampling", "gpu_sampling.py", PLACE / "sampling.json", *options)


def op_times(*options: object) -> Step:
    return _writing("op_times", "time_ops.py", PLACE / "op_times.json", *options)


# ---------------------------------------------------------------------- beside other programs


def official(folder: Path, results: Path, *options: object) -> Step:
    command = [PYTHON, "benchmarks/vs_official.py", "--official", folder, "--no-memory", *options]
    return Step([*command, "--folder", results], VERSUS["official"])


def dit(results: Path, *options: object) -> Step:
    return Step([PYTHON, "benchmarks/vs_dit.py", "--no-memory", *options, "--folder", results], VERSUS["dit"])
