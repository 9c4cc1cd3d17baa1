"""The hardware command: builds for the GPU at hand, tests, sanitizes, times, and writes one result file.

    make gpu                          # or: python benchmarks/gpu.py [--results DIR]
    make gpu DRY=1                    # without a GPU: build, collect tests, show the plan, run toys on the CPU
    make gpu-versus OFFICIAL=DIR      # or: --official DIR, a checkout of github.com/FoundationVision/VAR

It uses the Python that runs it and its torch, and needs no network: pip, pybind11, scikit-build-core,
CMake, ninja, pytest and nvcc must be installed. Steps that time nothing (tests, sanitizers) run in parallel, then the
timing steps alone. The file is benchmarks/results/CHIP-ARCHITECTURE-COMMIT.json, rewritten after each step; program
output is kept in build/gpu/logs. The exit status is 0 if every step passed; shapes left out for time are listed and
are no failure. VAR_EXT_COMMIT names the commit of a tree without .git.

The last command compares var_ext with the published code and with DiT, in the files of vs_official.py and vs_dit.py
under benchmarks/results/versus. The published code needs huggingface_hub. DiT needs diffusers, which needs a recent
huggingface_hub and safetensors, filelock, Pillow, and packages that a machine with torch may lack: importlib-metadata
with zipp, regex, and requests with urllib3, idna, certifi and charset-normalizer. Without network, bring them along:

    python -m pip download --no-deps --only-binary=:all: -d wheels diffusers importlib-metadata zipp regex requests ...
    python -m pip install --no-index --no-deps --target site wheels/*.whl       # there
    PYTHONPATH=site make gpu-versus OFFICIAL=DIR
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_steps as steps
import torch
from gpu_runner import Budget, Result, Step, together
from gpu_steps import PLACE, PYTHON, SHARES, VERSUS
from harness.report import FOLDER, ROOT, commit_of, machine, output_of, save, slug

SECONDS = 560.0  # for everything
DRY = 3600.0
SPARE = 20.0  # seconds before a timing step's end at which it begins nothing new
BESIDE = ("tests", "memcheck", "racecheck", "initcheck", "ptx", "occupancy")  # only timing needs a quiet chip


def architecture() -> str:
    """The build target of the GPU found; that of an H100 if there is none."""
    if not torch.cuda.is_available():
        return "90a"
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major == 9 else ''}"


def digest() -> str:
    """Digest of all kernel sources: distinguishes results where the commit cannot."""
    total = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def facts() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return machine(
        torch.device("cuda"),
        devices=torch.cuda.device_count(),
        architecture=f"sm_{architecture()}",
        multiprocessors=properties.multi_processor_count,
        memory=properties.total_memory,
        driver=output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        cuda=torch.version.cuda,
        nvcc=next(iter(re.findall(r"release ([\d.]+)", output_of("nvcc", "--version") or "")), None),
        triton=bool(find_spec("triton")),
        flash_attn=bool(find_spec("flash_attn")),
        sources=digest(),
    )


def name_of(about: Mapping[str, Any]) -> str:
    """The result file: h100-80gb-hbm3-sm_90a-0123456789ab.json."""
    return f"{slug(about)}-{about['architecture']}-{commit_of(about)}.json"


class Run:
    """The report of one run, kept in a file after each step.

    Args:
        budget: for all steps.
        file: None keeps nothing.
    """

    def __init__(self, budget: Budget, file: Path | None, **about: Any) -> None:
        self.budget, self.file = budget, file
        self.report: dict[str, Any] = dict(about)

    def keep(self, name: str, result: Result) -> None:
        self.report[name] = result
        if self.file:
            save(self.file, self.report)

    def do(self, **todo: Step) -> bool:
        """Runs steps, in parallel if several; returns whether all passed."""
        results = together(todo, self.budget, PLACE / "logs", self.keep)
        return all(result["ok"] for result in results.values())

    def built(self) -> bool:
        steps.environment()
        return self.do(build=steps.build(architecture()))

    def timing(self, name: str) -> tuple[str, str]:
        """How long a timing step may start new work."""
        return "--seconds", f"{max(10.0, self.budget.of(SHARES[name]) - SPARE):.0f}"

    def told(self, wanted: Mapping[str, float]) -> int:
        """The exit status; prints the outcome of each step."""
        for name in wanted:
            step = self.report.get(name, {})
            status = step.get("status", "not run")
            print(
                f"  {name}: {'passed' if step.get('ok') else 'FAILED'}, {status}, {step.get('seconds', 0)} s"
            )
        good = passed(self.report, wanted)
        print(f"{self.budget.spent():.0f} s; {'passed' if good else 'FAILED: read it'}")
        return int(not good)


def passed(report: Mapping[str, Any], wanted: Mapping[str, float] = SHARES) -> bool:
    """Whether every step was run and passed."""
    return all(report.get(name, {}).get("ok") for name in wanted)


def hardware(run: Run) -> int:
    if run.built():
        sanitizers = {name: steps.sanitizer(name) for name in steps.SANITIZERS}
        others = dict(tests=steps.tests(), ptx=steps.ptx(), occupancy=steps.occupancy())
        run.do(**others, **sanitizers)
        run.do(sampling=steps.sampling(*run.timing("sampling")))
        run.do(op_times=steps.op_times("--device", "cuda", *run.timing("op_times")))
    return run.told(SHARES)


def versus(run: Run, official: Path, results: Path, *options: object) -> int:
    if run.built():
        run.do(official=steps.official(official.resolve(), results, *options))
        run.do(dit=steps.dit(results, *options))
    return run.told(VERSUS)


def dry(run: Run) -> int:
    """The same steps without a GPU: tests are only collected, and toys run on the CPU."""
    wanted = dict(SHARES)
    if run.built():
        run.do(plan=Step([PYTHON, "benchmarks/time_ops.py", "--plan"], 60.0))
        wanted["plan"] = 60.0
        collected = {name: steps.collected(name) for name in BESIDE if name != "occupancy"}
        run.do(**collected, occupancy=steps.occupancy("--list"))
        run.do(sampling=steps.sampling("--smoke"))
        run.do(op_times=steps.op_times("--smoke"))
    return run.told(wanted)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="folder of the result file")
    parser.add_argument("--official", type=Path, help="the second command: a checkout of the published code")
    parser.add_argument("--dry", action="store_true", help="without a GPU: build, collect tests, run toys")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no step outlives this
    if options.dry:
        run = Run(Budget(DRY, shared=False), None)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # a toy's threads mostly wait for each other
        toy = ("--tiny", "--laps", "1", "--precisions", "fp32")
        status = versus(run, options.official, PLACE / "versus", *toy) if options.official else dry(run)
        print("DRY: nothing ran on a GPU, no result file.")
        return status
    if not torch.cuda.is_available():
        print(
            "There is no GPU, or this torch cannot use it; `make gpu DRY=1` goes as far as it can.",
            file=sys.stderr,
        )
        return 1
    about = facts()
    print(json.dumps(about, indent=1))
    if options.official:
        place = options.results / "versus"
        return versus(Run(Budget(SECONDS), None), options.official, place, "--device", "cuda")
    file = options.results / name_of(about)
    print(f"the report: {file}")
    return hardware(Run(Budget(SECONDS), file, about=about))


if __name__ == "__main__":
    sys.exit(main())
