"""Benchmarks are code too: every file runs once on a tiny shape, and the renderer makes a page of figures."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from var_ext import backend

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


@pytest.fixture(scope="module")
def gpu() -> Any:
    """benchmarks/gpu.py as a module."""
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_the_plan_for_a_gpu() -> None:
    """Every op has shapes for a GPU, and their sizes are known without one."""
    command = [sys.executable, "benchmarks/gpu_races.py", "--plan"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert {line.partition(",")[0] for line in done.stdout.splitlines()} == set(backend.CATALOGUE)
    (line,) = (x for x in done.stdout.splitlines() if "32 x 680 x 16 x 64, forward, bf16" in x)
    assert "178.3 MB, 37.5 GFLOP, 1 launches, 59.4 us at least on an H100" in line
    assert "FlexAttention" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would run")
@pytest.mark.parametrize("program", ["gpu", "gpu_races"])
def test_without_a_gpu_nothing_is_timed(program: str) -> None:
    command = [sys.executable, f"benchmarks/{program}.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "here is no GPU" in done.stderr


def test_each_file_races_on_the_cpu(tmp_path: Path) -> None:
    """The race's own code, every competitor of a tiny shape: what a GPU adds is its clock."""
    out = tmp_path / "races.json"
    command = [sys.executable, "benchmarks/gpu_races.py", "--smoke", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
    races = json.loads(out.read_text(encoding="utf-8"))
    assert {row["op"] for row in races["rows"]} == set(backend.CATALOGUE)
    for row in races["rows"]:
        assert {"var_ext", "reference"} <= set(row["competitors"])
        for figures in row["competitors"].values():
            assert set(figures) >= {"call_us", "graph_us", "tflops", "gbps", "of_ceiling", "spread"}, figures


ABOUT = dict(
    chip="NVIDIA H100 80GB HBM3", architecture="sm_90a", commit="0123456789abcdef", dirty=False, driver="1.2",
    cuda="13.0", nvcc="13.0", torch="2.11", sources="fedcba", date="2026-01-02T03:04:05+00:00",
)  # fmt: skip


def result(gpu: Any) -> dict[str, Any]:
    """As the hardware command writes it: one shape, one competitor that could not be captured, one that failed."""
    slow = dict(gbps=1.0, tflops=1.0, of_ceiling=0.1, spread=0.0, call_us=30.0, graph_us=None)
    figures = dict(gbps=1500.0, tflops=20.5, of_ceiling=0.5, spread=0.01, call_us=20.0, graph_us=10.0)
    row = dict(
        op="qk_norm", shape="2 x 3, bf16", kernel="native", flops=1, roofline_us=4.0,
        competitors={"var_ext": figures, "reference": slow, "torch.compile": dict(error="RuntimeError: no")},
    )  # fmt: skip
    steps: dict[str, Any] = {name: dict(ok=True, status="0", seconds=1.0) for name in gpu.SHARES}
    steps["tests"] |= dict(ran=7, skipped={"a": "no"}, failed=[])
    steps["races"] |= dict(
        rows=[row], left_out={"adaln, 1 x 1": "no time left"}, ceilings={"copy": 3e12, "bf16": 7e14}
    )
    return {"about": ABOUT, **steps}


def test_the_result_of_a_gpu(gpu: Any) -> None:
    assert gpu.name_of(ABOUT) == "h100-80gb-hbm3-sm_90a-0123456789ab.json"
    assert gpu.name_of({**ABOUT, "dirty": True}) == "h100-80gb-hbm3-sm_90a-0123456789ab-dirty.json"
    assert gpu.name_of({**ABOUT, "commit": None, "dirty": None}) == "h100-80gb-hbm3-sm_90a-unknown.json"
    good = result(gpu)
    assert gpu.passed(good)
    for name in gpu.SHARES:
        assert not gpu.passed({key: value for key, value in good.items() if key != name})
        assert not gpu.passed({**good, name: {**good[name], "ok": False}})


def test_a_missing_sanitizer_is_no_pass(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: None)
    assert gpu.sanitize("memcheck") == dict(ok=False, status="not run: compute-sanitizer is not installed")


@pytest.mark.parametrize(
    ("said", "ok"), [("========= ERROR SUMMARY: 0 errors", True), ("no such device", False)]
)
def test_a_sanitizer_must_have_looked(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, ok: bool
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{said}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu.sanitize("memcheck")["ok"] == ok


def test_a_step_is_stopped_with_its_children(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a GPU brings limits of its own
    monkeypatch.setattr(gpu, "DRY", 1.0)
    step = gpu.run("build", ["sh", "-c", "echo begun; sleep 60 & wait"])
    assert (step["ok"], step["status"], step["end"]) == (False, "stopped after 1 s", "begun\n")
    assert gpu.run("build", ["/no/such/program"])["ok"] is False


def test_the_page_of_gpus(gpu: Any, tmp_path: Path) -> None:
    """The newest result of a chip; none claims nothing."""

    def page() -> str:
        program = (
            "import pathlib, sys; sys.path.insert(0, 'benchmarks'); import gpu_page; "
            f"print(gpu_page.section(pathlib.Path({str(tmp_path)!r})))"
        )
        command = [sys.executable, "-c", program]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        ).stdout

    assert "No result yet" in page()
    report = result(gpu)
    older = {**report, "about": {**ABOUT, "date": "2025-01-01T00:00:00+00:00", "torch": "old"}}
    for name, content in (("a", report), ("b", older)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    text = page()
    assert "| 2 x 3, bf16 | 10.0 µs | 30.0 µs * |  | 3.00 | 1500 | 20.5 | 4.00 µs | 50% |" in text
    assert "torch 2.11" in text and "torch old" not in text
    assert "3.00 TB/s copied, 700 TFLOP/s bf16" in text
    assert "passed in 1 s: 7 tests, 1 skipped" in text
    assert "- adaln, 1 x 1: no time left" in text
    (tmp_path / "a.json").write_text(json.dumps({"about": ABOUT, "build": report["build"]}), encoding="utf-8")
    assert "| races | **not run** |" in page()
