"""Benchmarks are code too: every file runs once on a tiny shape, and the renderer makes a page of figures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("benchmarks")  # one process runs the files for all
ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "benchmarks").glob("bench_*.py"))


@pytest.fixture(scope="module")
def smoke() -> str:
    """What pytest says of a run of all files, each competitor once and checked against the reference."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--smoke",
        "--benchmark-disable",
        "-v",
        *FILES,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False).stdout


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_benchmark_runs(smoke: str, file: Path) -> None:
    passed = re.findall(rf"benchmarks/{file.name}::.*\[smoke-0-(.*)\] PASSED", smoke)
    competitors = re.search(r"^COMPETITORS = \((.*)\)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert competitors
    assert passed == re.findall(r'"([^"]*)"', competitors[1]), smoke


def entry(op: str, shape: str, competitor: str, lap: int, seconds: float, **extra: int) -> dict[str, object]:
    """As pytest-benchmark writes it, as far as the renderer reads it."""
    known = dict(
        op=op, shape=shape, competitor=competitor, lap=lap, bytes=0, flops=0, images=0, kernel="native"
    )
    return {"stats": {"median": seconds}, "extra_info": {**known, **extra}}


def render(report: dict[str, object], folder: Path) -> subprocess.CompletedProcess[str]:
    """The program on a report; the page goes to `folder`/page.md."""
    source, page = folder / "report.json", folder / "page.md"
    source.write_text(json.dumps(report), encoding="utf-8")
    command = [sys.executable, "benchmarks/render.py", source, "--out", page]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_a_partial_run_makes_no_page(tmp_path: Path) -> None:
    report = {"benchmarks": [entry("adaln", "2 x 3", "var_ext", 0, 1e-3)]}
    done = render(report, tmp_path)
    assert done.returncode == 1 and not (tmp_path / "page.md").exists()
    assert done.stderr.startswith("the run must include bench_limits.py, got no bf16 product of 2048")


@pytest.mark.parametrize(("load", "busy"), [(0.3, False), (5.0, True)])
def test_the_page_shows_the_figures(tmp_path: Path, load: float, busy: bool) -> None:
    limits = [
        entry("limits", "copy of 256 MiB", "torch", 0, 0.1, bytes=10**9),  # 10 GB/s
        entry("limits", "fp32 product of 2048 x 2048", "torch", 0, 0.1, flops=10**10),  # 100 GFLOP/s
        entry("limits", "bf16 product of 2048 x 2048", "torch", 0, 0.1, flops=2 * 10**10),
    ]
    laps = {"var_ext": (1e-3, 2e-3, 9e-3), "reference": (4e-3, 4e-3, 4e-3), "other": (3e-3, 3e-3, 3e-3)}
    timed = [
        entry("nearest_code", "7 x 5", name, lap, seconds, bytes=10**6, flops=10**8)
        for name, times in laps.items()
        for lap, seconds in enumerate(times)
    ]
    timed += [
        entry("nearest_code", "7 x 5, bf16", name, 0, 1e-3, bytes=10**6, flops=10**8)
        for name in ("var_ext", "reference", "other")
    ]
    drawn = [
        entry("sampling", "batch 10", name, 0, t, images=10)
        for name, t in (("var_ext", 0.5), ("reference", 1.0))
    ]
    report = {
        "machine_info": {
            "cpu": {"brand_raw": "Some chip", "count": 2},
            "machine": "x86_64",
            "system": "Linux",
            "release": "6",
            "python_version": "3.11",
            "torch": "2.13.0",
            "threads": 2,
            "load": load,
            "var_ext": {"version": "9.9", "compiler": "GNU 12", "isa": "avx2"},
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [*limits, *timed, *drawn],
    }
    assert render(report, tmp_path).returncode == 0
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    # the median lap took 2 ms: 2 times the reference, 1.5 times the best; half of what the product allows
    assert "| 7 x 5 | 2.00 ms | 4.00 ms | 3.00 ms | 2.00 | 1.50 | 0.50 | 50.0 | 50% |" in page
    # the same work in bf16 stands beside the bf16 product
    assert "| 7 x 5, bf16 | 1.00 ms | 1.00 ms | 1.00 ms | 1.00 | 1.00 | 1.00 | 100.0 | 50% |" in page
    assert "| batch 10 | 20.0 | 10.0 | 500 ms | 2.00 |" in page
    assert "`0123456789ab` with uncommitted changes" in page
    assert "Some chip, 2 cores" in page
    ops = page.split("# Beside other programs")[0]  # what follows are this repository's own results
    assert ("busy" in ops) == busy
    assert "10.0 GB/s" in page
    assert "100 GFLOP/s" in page
