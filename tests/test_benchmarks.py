"""Benchmarks are code too: every file runs once on a tiny shape, and its figures make a page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py"))


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


# ---------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report on all files, each competitor checked against the reference: what a GPU adds is its clock."""
    out = tmp_path_factory.mktemp("smoke") / "op_times.json"
    command = [sys.executable, "benchmarks/time_ops.py", "--smoke", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(out.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", FILES)
def test_each_benchmark_runs(smoke: dict[str, Any], name: str) -> None:
    from harness.jobs import build, files

    (row,) = (row for row in smoke["rows"] if row["op"] == name)
    module = files()[name]
    on_a_gpu = hasattr(module, "GPU_SHAPES")
    wanted = (
        build(module, module.SMOKE, "meta").competitors if on_a_gpu else dict.fromkeys(row["competitors"])
    )
    assert set(row["competitors"]) == set(wanted) and len(wanted) >= 2
    assert {"var_ext", "reference"} <= set(wanted) or name == "threads"
    for figures in row["competitors"].values():
        assert set(figures) == {"call_us", "graph_us", "tflops", "gbps", "of_ceiling", "spread"}, figures
        assert figures["call_us"] > 0 and figures["graph_us"] > 0


def test_a_wrong_competitor_is_not_timed() -> None:
    from harness.case import Case
    from harness.clock import Rehearsal
    from time_ops import Timer

    calls: dict[str, Callable[[], Any]] = {
        "var_ext": lambda: torch.ones(2),
        "reference": lambda: torch.zeros(2),
    }
    laps: dict[Any, Any] = {}
    timer = Timer(Rehearsal(torch.device("cpu")), {})
    assert timer.enter("adaln", [Case(calls)], "var_ext", laps)["error"].startswith("AssertionError: ")
    assert not laps and timer.enter("adaln", [Case(calls)], "reference", laps) == {} and laps


def test_a_figure_is_the_median_lap() -> None:
    from harness.case import Case
    from time_ops import figures_of

    case, calls = Case({}, bytes=10**6, flops=10**9), [[1e-3, 1e-3, 8e-3], [2e-3], [9e-3, 9e-3]]
    figures = figures_of(case, {"call": calls}, least_us=1000.0)
    assert (figures["call_us"], figures["graph_us"]) == (2000.0, None)
    assert figures["gbps"] == pytest.approx(0.5) and figures["tflops"] == pytest.approx(0.5)
    assert figures["of_ceiling"] == 0.5 and figures["spread"] == 4.0
    graphed = figures_of(case, {"call": calls, "graph": [[1e-3]]}, least_us=1000.0)
    assert graphed["graph_us"] == 1000.0 and graphed["of_ceiling"] == 1.0


# ---------------------------------------------------------------------- the page


def row(op: str, shape: str, *, images: int = 0, **milliseconds: float) -> dict[str, Any]:
    """As time_ops.py writes it: 1 MB and 0.1 GFLOP, which take at least 1 ms."""
    competitors = {
        name: dict(
            call_us=ms * 1e3, graph_us=None, gbps=1 / ms, tflops=0.1 / ms, of_ceiling=1 / ms, spread=0.2
        )
        for name, ms in milliseconds.items()
    }
    return dict(op=op, shape=shape, kernel="native", flops=10**8, images=images, competitors=competitors)


def report(*rows: dict[str, Any], **about: Any) -> dict[str, Any]:
    known = dict(
        chip="Some chip, 2 cores", threads=2, load=0.3, torch="2.13.0", python="3.11", var_ext="9.9 (GNU 12, avx2)",
        commit="0123456789abcdef", dirty=True, date="2026-01-02T03:04:05+00:00",
    )  # fmt: skip
    rates = dict(copy=1e10, fp32=1e11, bf16=2e11)
    return dict(about=known | about, ceilings=rates, rows=list(rows), left_out={}, failed={})


def page_of(folder: Path, *reports: dict[str, Any]) -> str:
    import ops_page

    for number, given in enumerate(reports):
        (folder / f"{number}.json").write_text(json.dumps(given), encoding="utf-8")
    return ops_page.section(folder)


def test_no_result_no_figure(tmp_path: Path) -> None:
    assert "No result yet" in page_of(tmp_path)


@pytest.mark.parametrize(("load", "busy"), [(0.3, False), (5.0, True)])
def test_the_page_shows_the_figures(tmp_path: Path, load: float, busy: bool) -> None:
    failed = row("nearest_code", "9 x 9", reference=4)
    failed["competitors"]["var_ext"] = dict(error="AssertionError: not close")
    rows = [row("nearest_code", "7 x 5", var_ext=2, reference=4, other=3), failed]
    rows += [row("sampling", "batch 10", var_ext=500, reference=1000, images=10)]
    rows += [
        {
            **row("threads", "20 each"),
            "competitors": row("", "", **{"in turns": 3, "apart": 2})["competitors"],
        }
    ]
    page = page_of(tmp_path, report(*rows, load=load))
    assert "| 7 x 5 | 2.00 ms | 4.00 ms | 3.00 ms | 2.00 | 1.50 | 0.50 | 50.0 | 50% |" in page
    assert "| 9 x 9 |  | 4.00 ms |  |  |  |  |  | failed |" in page
    assert "| batch 10 | 20.0 | 10.0 | 500 ms | 2.00 |" in page
    assert "| one pool of threads | 20 each: 3.00 ms in turns, 2.00 ms apart |" in page
    assert "`0123456789ab` with uncommitted changes" in page and "Some chip, 2 cores" in page
    assert ("busy" in page) == busy
    assert "10.0 GB/s" in page and "100 GFLOP/s in fp32 and 200 GFLOP/s in bf16" in page


def test_an_op_stands_as_its_last_run_timed_it(tmp_path: Path) -> None:
    whole = report(row("adaln", "2 x 3", var_ext=1, reference=4), row("qk_norm", "5", var_ext=1, reference=5))
    later = report(row("adaln", "2 x 3", var_ext=1, reference=9), date="2026-02-02T00:00:00+00:00")
    page = page_of(tmp_path, whole, later)
    assert page.count("### adaln") == 1 and "9.00 ms" in page and "4.00 ms" not in page
    assert "| timed | qk_norm |" in page and "| timed | adaln |" in page


def test_runs_of_single_ops_keep_each_others_figures() -> None:
    """Of one chip and commit: without their names the second would replace the file of the first."""
    from time_ops import kept_in

    about = {"chip": "AMD EPYC, 2 cores", "commit": "0123456789abcdef", "dirty": False}
    names = [kept_in(about, only).name for only in ("", "adaln", "qk_norm")]
    assert names == [f"amd-epyc-2-cores-0123456789ab{end}.json" for end in ("", "-adaln", "-qk_norm")]


def test_a_part_of_the_page_takes_its_place() -> None:
    from harness.results_page import put

    page = "# Ops\n\nThe ops.\n\n## One\n\n# Others\n\nSome.\n"
    assert put(page, "# Ops\n\nNew.\n") == "# Ops\n\nNew.\n\n# Others\n\nSome.\n"
    assert put(page, "# Others\n\nNew.\n") == page.replace("Some", "New")
    assert put(page, "# GPUs\n\nNew.\n") == page + "\n# GPUs\n\nNew.\n"


@pytest.mark.parametrize("writer", ["ops_page", "versus_page", "gpu_page"])
def test_the_page_of_the_repository_is_up_to_date(writer: str) -> None:
    from importlib import import_module

    from harness.results_page import put

    page = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert put(page, import_module(writer).section()) == page, f"python benchmarks/{writer}.py"
