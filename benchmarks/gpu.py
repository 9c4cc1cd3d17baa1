"""The hardware command: builds for the GPU at hand, tests, sanitizes, races, and writes one result file.

    make gpu                          # or: python benchmarks/gpu.py [--results DIR]
    make gpu DRY=1                    # without a GPU: as far as it goes

It takes the Python that runs it with the torch that is there, and needs no network: pybind11, scikit-build-core,
CMake, ninja, pytest and nvcc must be installed. The file is benchmarks/results/CHIP-COMMIT.json; the exit status is 0
if build and tests passed and every race of var_ext was run and right.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "gpu"
SANITIZERS = ("memcheck", "racecheck")
CASES = {"memcheck": "2", "racecheck": "1"}  # of each test: a sanitizer makes them a hundred times slower


def run(command: Sequence[str], seconds: float, **environment: str) -> dict[str, Any]:
    """A step of the report. Its output is shown, and its end is kept."""
    print(f"\n$ {' '.join(map(str, command))}", flush=True)
    # the pins of `make` are those of another environment
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            list(map(str, command)), cwd=PLACE, env={**inherited, **environment}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=seconds,
        )  # fmt: skip
        status, text = str(done.returncode), done.stdout
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        status, text = f"stopped after {seconds:.0f} s", out.decode() if isinstance(out, bytes) else out
    print(text[-3000:], flush=True)
    return dict(status=status, seconds=round(time.perf_counter() - begin, 1), end=text[-3000:])


def architecture() -> str:
    """As CMake names the chip at hand; that of an H100 where there is none."""
    if not torch.cuda.is_available():
        return "90a-real"
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major == 9 else ''}-real"


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def facts() -> dict[str, Any]:
    there = torch.cuda.is_available()
    return dict(
        chip=torch.cuda.get_device_name() if there else "no GPU",
        capability=architecture(),
        multiprocessors=torch.cuda.get_device_properties(0).multi_processor_count if there else 0,
        driver=output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        cuda=torch.version.cuda,
        nvcc=(re.findall(r"release ([\d.]+)", output_of("nvcc", "--version")) or [""])[0],
        torch=torch.__version__,
        python=platform.python_version(),
        commit=os.environ.get("VAR_EXT_COMMIT") or output_of("git", "rev-parse", "HEAD"),
        dirty=bool(output_of("git", "status", "--porcelain")),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )


def name_of(about: Mapping[str, Any]) -> str:
    """The result file: h100-80gb-hbm3-0123456789ab.json."""
    chip = about["chip"].lower().removeprefix("nvidia ")
    return f"{re.sub(r'[^a-z0-9]+', '-', chip).strip('-')}-{(about['commit'] or 'unknown')[:12]}.json"


def build() -> tuple[dict[str, Any], dict[str, str]]:
    """The extension for one chip, in a tree of its own with the tests, away from the sources' package."""
    shutil.rmtree(PLACE, ignore_errors=True)
    (PLACE / "site").mkdir(parents=True)
    for folder in ("tests", "benchmarks", "csrc"):
        shutil.copytree(ROOT / folder, PLACE / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / file, PLACE)
    settings = {"VAR_EXT_CUDA": "ON", "CMAKE_CUDA_ARCHITECTURES": architecture()}
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        PLACE / "site",
    ]
    for key, value in settings.items():
        command += ["-C", f"cmake.define.{key}={value}"]
    step = run([*map(str, command), "-C", f"build-dir={PLACE / 'build'}", str(ROOT)], 400)
    return step, {"PYTHONPATH": os.pathsep.join([str(PLACE / "site"), os.environ.get("PYTHONPATH", "")])}


def sanitize(environment: Mapping[str, str]) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return {name: dict(status="compute-sanitizer is not installed") for name in SANITIZERS}
    small = "hardware and not large and not long and not 680"
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/cuda", "-k", small]
    checked = dict(environment, VAR_EXT_GPU_TESTS="hardware", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return {
        name: run(
            [tool, "--tool", name, "--error-exitcode", "9", "--target-processes", "all", *pytest],
            75,
            **checked,
            VAR_EXT_GPU_CASES=CASES[name],
        )
        for name in SANITIZERS
    }


def passed(report: Mapping[str, Any]) -> bool:
    races = report["races"]
    return (
        report["build"]["status"] == report["tests"]["status"] == "0"
        and bool(races.get("rows"))
        and not any("var_ext" in row["failed"] for row in races["rows"])
    )


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
    parser.add_argument("--seconds", type=float, default=200.0, help="for the races")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.dry:
        print(
            "There is no GPU, or this torch cannot use it; `make gpu DRY=1` goes as far as it can.",
            file=sys.stderr,
        )
        return 1
    about = facts()
    print(json.dumps(about, indent=1))
    report: dict[str, Any] = dict(about=about, races={})
    report["build"], environment = build()
    if report["build"]["status"] != "0":
        return 1
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda"]
    races = [sys.executable, "benchmarks/gpu_races.py"]
    if options.dry:
        collected = run(
            [*tests, "--collect-only", "-k", "hardware"], 120, VAR_EXT_GPU_TESTS="hardware", **environment
        )
        planned = run([*races, "--plan"], 300, **environment)
        print("\nDRY: nothing ran on a GPU, no result file.")
        return int(collected["status"] != "0" or planned["status"] != "0")
    hardware = dict(environment, VAR_EXT_GPU_TESTS="hardware")
    report["tests"] = run([*tests, "-k", "hardware"], 200, **hardware)
    out = PLACE / "races.json"
    step = run(
        [*races, "--out", str(out), "--seconds", str(options.seconds)], options.seconds + 120, **environment
    )
    report["races"] = {**(json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}), "step": step}
    report["sanitizer"] = sanitize(environment)  # last: the rest counts more, should time run out
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / name_of(about)
    file.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"wrote {file}; {'passed' if passed(report) else 'FAILED: read it'}")
    return int(not passed(report))


if __name__ == "__main__":
    sys.exit(main())
