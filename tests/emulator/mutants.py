"""Removes each barrier, wait and mask from the CUDA kernels, one at a time, and shows which test of tests/cuda fails.

    python -m tests.emulator.mutants [--jobs 2] [--only attention_forward] [--out mutants.md]

Prints a table in Markdown. The exit status is 1 if a change was not noticed. Masks are the lines marked `// mask`:
their condition becomes true. One build holds all mutants; a number in the environment takes one of them away.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.build.tools import ROOT
from tests.emulator.emulation import build

KERNELS = ROOT / "csrc" / "cuda"
SCRATCH = ROOT / "build" / "mutants"
BARRIER = re.compile(
    r"^\s*(__syncthreads\(\)|__syncwarp\(\)|(ptx::)?cp_async_wait<.*>\(\)|ptx::wait_for_previous\(\));$"
)
MASKS = (
    re.compile(r"^(?P<before>.*?\bbool \w+ = )(?P<condition>[^;]+)(?P<after>;  // mask)$"),
    re.compile(r"^(?P<before>\s*(\} else )?if \()(?P<condition>.+)(?P<after>\) .*// mask)$"),
)


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int  # from 1
    old: str
    new: str  # "#" stands for whether this one is removed

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def shown(self) -> str:
        """What is taken away."""
        return self.old.strip().removesuffix("// mask").strip()


def mutants_of(file: str, text: str) -> Iterator[Mutant]:
    """One mutant a barrier, wait and mask.

    Raises:
        ValueError: a line is marked as a mask, but its condition does not stand alone.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if BARRIER.match(line):
            yield Mutant(file, number, line, f"if (!#) {line.strip()}")
        elif line.rstrip().endswith("// mask"):
            found = next((match for match in (mask.match(line) for mask in MASKS) if match), None)
            if found is None:
                wanted = "`bool x = ...;  // mask` or `if (...) ...  // mask`"
                raise ValueError(f"{file}:{number}: a mask must read {wanted}")
            yield Mutant(file, number, line, f"{found['before']}# || ({found['condition']}){found['after']}")


def suites_of(file: str) -> list[str]:
    """Tests that reach the code of a file: those of its op; of ops that share it where there are several."""
    tests = sorted(path.name for path in (ROOT / "tests/cuda").glob("test_*.py"))
    own = [test for test in tests if file.startswith(Path(test).stem.removeprefix("test_"))]
    exact = max(own, key=len, default=None)
    if exact is not None:
        return [exact]
    if file.startswith("resample"):
        return ["test_area_downsample.py", "test_bicubic_upsample.py"]
    if file.startswith("rows"):
        return ["test_adaln.py", "test_bias_gelu.py"]
    shared = [test for test in tests if "attention" in test]
    return [test for test in shared if "backward" in test] if "backward" in file else shared


def instrumented(mutants: Sequence[Mutant]) -> Path:
    """A module of the emulator that can take away each of them."""
    shutil.rmtree(SCRATCH / "csrc", ignore_errors=True)
    # newer than what an earlier run built from them: all of it is built anew
    shutil.copytree(ROOT / "csrc", SCRATCH / "csrc", copy_function=shutil.copy)
    for number, mutant in enumerate(mutants):
        copy = SCRATCH / "csrc" / "cuda" / mutant.file
        lines = copy.read_text(encoding="utf-8").split("\n")
        assert lines[mutant.line - 1] == mutant.old
        lines[mutant.line - 1] = mutant.new.replace("#", f"::emulator::removed({number})", 1)
        copy.write_text("\n".join(lines), encoding="utf-8")
    # loaded by many processes: another build must not change it under them
    return Path(shutil.copy(build(SCRATCH / "build", SCRATCH / "csrc"), SCRATCH))


def run_tests(module: Path, number: int, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The tests with one mutant, slow ones too; none has the number -1."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "--tb=line",
    ]
    return subprocess.run(
        [*command, *(f"tests/cuda/{test}" for test in tests)],
        cwd=ROOT,
        env={
            **os.environ,
            "VAR_EXT_EMULATED": str(module),
            "VAR_EXT_GPU_TESTS": "emulated",
            "VAR_EXT_MUTANT": str(number),
        },
        capture_output=True,
        text=True,
    )


def notice(module: Path, number: int, mutant: Mutant) -> str | None:
    """What the first failing test says of a mutant; None if all pass."""
    done = run_tests(module, number, suites_of(mutant.file))
    if done.returncode == 0:
        return None
    failed = re.findall(r"^FAILED tests/cuda/(\S+)", done.stdout, re.M)
    said = re.findall(r"(EmulatorError|AssertionError|Error): (.*)", done.stdout)
    if not failed:
        raise RuntimeError(
            f"{mutant.place}: the tests did not run:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
    what = said[0][1] if said else "wrong result"
    what = re.sub(r"device memory at 0x[0-9a-f]+", "device memory", what)  # another address each time
    return f"{failed[0].split('::')[-1]}: {re.sub(r'^.*?thread [0-9]+: ', '', what)[:110]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="files whose names begin so")
    parser.add_argument("--out", type=Path, help="file for the table")
    options = parser.parse_args()
    mutants = [
        mutant
        for path in sorted([*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")])
        if path.name.startswith(options.only) and path.name not in ("ptx.cuh", "launch.cuh")
        for mutant in mutants_of(path.name, path.read_text(encoding="utf-8"))
    ]
    module = instrumented(mutants)
    suites = sorted({test for mutant in mutants for test in suites_of(mutant.file)})
    whole = run_tests(module, -1, suites)  # that the build alone changes nothing
    if whole.returncode != 0:
        raise RuntimeError(f"tests fail with nothing removed:\n{whole.stdout[-2000:]}")

    table = ["| removed | noticed by |", "| --- | --- |"]
    survived = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        found = pool.map(lambda pair: notice(module, *pair), enumerate(mutants))
        for mutant, noticed in zip(mutants, found, strict=True):
            survived += noticed is None
            table.append(f"| {mutant.place} `{mutant.shown}` | {noticed or '**nobody**'} |")
            print(table[-1], flush=True)
    table += ["", f"{len(mutants)} removed, {len(mutants) - survived} noticed"]
    print(table[-1])
    if options.out:
        options.out.write_text("\n".join(["# Mutants of the CUDA kernels", "", *table, ""]), encoding="utf-8")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
