"""Removes each barrier, wait and mask from the CUDA kernels, one at a time, and shows which test of tests/cuda fails.

    python -m tests.emulator.mutants [--jobs 2] [--only attention_forward]

Prints a table in Markdown. The exit status is 1 if a change was not noticed. Masks are the lines marked `// mask`:
their condition becomes true.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

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
    new: str

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def mutants_of(file: str, text: str) -> Iterator[Mutant]:
    """One mutant a barrier, wait and mask.

    Raises:
        ValueError: a line is marked as a mask, but its condition does not stand alone.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if BARRIER.match(line):
            yield Mutant(file, number, line, "")
        elif line.rstrip().endswith("// mask"):
            found = next((match for match in (mask.match(line) for mask in MASKS) if match), None)
            if found is None:
                wanted = "`bool x = ...;  // mask` or `if (...) ...  // mask`"
                raise ValueError(f"{file}:{number}: a mask must read {wanted}")
            yield Mutant(file, number, line, f"{found['before']}true{found['after']}")


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


def notice(mutant: Mutant, folder: Path) -> str | None:
    """What the first failing test says of a mutant; None if all pass. `folder` holds a copy of csrc and its build."""
    copy = folder / "csrc" / "cuda" / mutant.file
    original = copy.read_text(encoding="utf-8")  # of the copy: the sources may be edited meanwhile
    lines = original.split("\n")
    assert lines[mutant.line - 1] == mutant.old
    lines[mutant.line - 1] = mutant.new
    copy.write_text("\n".join(lines), encoding="utf-8")
    try:
        module = build(folder / "build", folder / "csrc")
    except RuntimeError as error:
        raise RuntimeError(f"{mutant.place}: {error}") from error
    finally:
        copy.write_text(original, encoding="utf-8")
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
    done = subprocess.run(
        [*command, *(f"tests/cuda/{test}" for test in suites_of(mutant.file))],
        cwd=ROOT,
        env={**os.environ, "VAR_EXT_EMULATED": str(module), "VAR_EXT_GPU_TESTS": "emulated"},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return None
    failed = re.findall(r"^FAILED tests/cuda/(\S+)", done.stdout, re.M)
    said = re.findall(r"(EmulatorError|AssertionError|Error): (.*)", done.stdout)
    if not failed:
        raise RuntimeError(
            f"{mutant.place}: the tests did not run:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
    what = said[0][1] if said else "wrong result"
    return f"{failed[0].split('::')[-1]}: {re.sub(r'^.*?thread [0-9]+: ', '', what)[:110]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="files whose names begin so")
    options = parser.parse_args()
    mutants = [
        mutant
        for path in sorted([*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")])
        if path.name.startswith(options.only) and path.name not in ("ptx.cuh", "launch.cuh")
        for mutant in mutants_of(path.name, path.read_text(encoding="utf-8"))
    ]
    folders: Queue[Path] = Queue()
    for i in range(options.jobs):
        folder = SCRATCH / str(i)
        shutil.rmtree(folder / "csrc", ignore_errors=True)
        # newer than what an earlier run built from them: all of it is built anew
        shutil.copytree(ROOT / "csrc", folder / "csrc", copy_function=shutil.copy)
        folders.put(folder)

    def judge(mutant: Mutant) -> str | None:
        folder = folders.get()
        try:
            return notice(mutant, folder)
        finally:
            folders.put(folder)

    print("| removed | noticed by |\n| --- | --- |", flush=True)
    survived = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, noticed in zip(mutants, pool.map(judge, mutants), strict=True):
            survived += noticed is None
            shown = mutant.old.strip().removesuffix("// mask").strip()
            print(f"| {mutant.place} `{shown}` | {noticed or '**nobody**'} |", flush=True)
    print(f"\n{len(mutants)} removed, {len(mutants) - survived} noticed")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
