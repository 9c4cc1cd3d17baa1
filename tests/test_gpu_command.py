"""The hardware command without its hardware: budget, steps side by side, timing order, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.test_layout import LEFT_TO_TORCH
from var_ext import ops

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"benchmarks/{program}.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


# ---------------------------------------------------------------------- budget and steps


def test_a_step_has_its_share_of_what_is_left() -> None:
    from gpu_runner import Budget

    clock = [100.0]
    budget = Budget(560.0, now=lambda: clock[0])
    assert (budget.of(240), budget.spent()) == (240, 0)
    clock[0] += 400
    assert (budget.of(90), budget.of(420)) == (90, 160)
    clock[0] += 159
    assert budget.of(90) == 5  # it may say why it cannot
    unshared = Budget(3600.0, shared=False, now=lambda: clock[0])
    assert unshared.of(90) == 3600


def test_the_shares_fit_the_budget() -> None:
    """If every earlier step takes its whole share, some ops are still timed."""
    import gpu

    beside = max(gpu.SHARES[name] for name in gpu.BESIDE)
    before = gpu.SHARES["build"] + beside + gpu.SHARES["sampling"]
    assert before + 60 < gpu.SECONDS < 600
    assert set(gpu.SHARES) == {"build", "sampling", "op_times", *gpu.BESIDE}
    timing = gpu.Run(gpu.Budget(gpu.SECONDS, now=lambda: 0.0), None).timing("sampling")
    assert timing == ("--seconds", "70")


def step(text: str, seconds: float = 30.0, **more: Any) -> Any:
    from gpu_runner import Step

    return Step(["sh", "-c", text], seconds, **more)


def test_steps_run_side_by_side(tmp_path: Path) -> None:
    """One that hangs is stopped with its children and the others go on; each is kept as it ends, with its output."""
    from gpu_runner import OF_FAILURE, Budget, Step, together

    kept: list[str] = []
    marks = tmp_path / "marks"
    marks.mkdir()
    # the first two can only end if they run at once
    meet = "touch {0}/{1}; for i in $(seq 300); do test -e {0}/{2} && echo met && exit 0; sleep 0.1; done; exit 1"
    child = f"echo begun; sh -c 'sleep 2; touch {marks}/late' & wait"
    steps = {
        "one": step(meet.format(marks, "a", "b")),
        "other": step(meet.format(marks, "b", "a"), read=lambda result, text: dict(said=text.strip())),
        "hangs": step(child, 1.0),
        "fails": step(
            f"head -c {2 * OF_FAILURE} /dev/zero | tr '\\0' x; echo $HOW; exit 3", environment={"HOW": "so"}
        ),
        "missing": Step(["/no/such/program"], 30.0),
    }
    begin = time.monotonic()
    results = together(steps, Budget(60.0), tmp_path / "logs", lambda name, result: kept.append(name))
    assert time.monotonic() - begin < 15
    assert {name: result["ok"] for name, result in results.items()} == {
        "one": True, "other": True, "hangs": False, "fails": False, "missing": False,
    }  # fmt: skip
    assert results["one"]["end"] == "met\n" and results["other"]["said"] == "met"
    assert (results["hangs"]["status"], results["hangs"]["end"]) == ("stopped after 1 s", "begun\n")
    assert results["fails"]["status"] == "3" and results["fails"]["end"].endswith("xso\n")
    assert len(results["fails"]["end"]) == OF_FAILURE
    assert len((tmp_path / "logs" / "fails.txt").read_text()) == 2 * OF_FAILURE + 3
    assert results["missing"]["status"].startswith("not run: ")
    assert (
        sorted(kept) == sorted(steps) and kept[0] == "missing" and kept.index("fails") < kept.index("hangs")
    )
    time.sleep(max(0.0, begin + 3.5 - time.monotonic()))
    assert not (marks / "late").exists()


def test_figures_are_kept_as_they_come(tmp_path: Path) -> None:
    """A command that is cut off within a step leaves what that step had written."""
    from gpu_runner import Budget, together

    kept: list[dict[str, Any]] = []
    file = tmp_path / "op_times.json"
    file.write_text('{"rows": ["of another run"]}')
    write = f"echo '{{\"rows\": [%s]}}' > {tmp_path}/new; mv {tmp_path}/new {file}; "
    program = write % "1" + "sleep 2.5; " + write % "1, 2" + "exit 1"
    steps = {"op_times": step(program, figures=file)}
    together(steps, Budget(60.0), tmp_path, lambda name, result: kept.append(result))
    assert [(result["status"], result["rows"]) for result in kept] == [("under way", [1]), ("1", [1, 2])]
    assert not any(result["ok"] for result in kept)


def test_no_step_outlives_the_command(tmp_path: Path) -> None:
    from gpu_runner import Budget, together

    def broken(name: str, result: Any) -> None:
        raise OSError("no space left on device")

    steps = {"quick": step("true"), "slow": step(f"sleep 2; touch {tmp_path}/late")}
    with pytest.raises(OSError, match="no space left"):
        together(steps, Budget(60.0), tmp_path, broken)
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


def test_the_pins_of_the_makefile_stay_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_runner import Budget, together

    monkeypatch.setenv("PIP_CONSTRAINT", "constraints.txt")
    results = together({"a": step("echo [$PIP_CONSTRAINT]")}, Budget(60.0), tmp_path, lambda *_: None)
    assert results["a"]["end"] == "[]\n"


def test_a_step_that_left_rubbish_fails_alone(tmp_path: Path) -> None:
    from gpu_runner import Budget, together

    steps = {"a": step("true", read=lambda *_: json.loads("{")), "b": step("true")}
    results = together(steps, Budget(60.0), tmp_path, lambda *_: None)
    assert (results["a"]["ok"], results["b"]["ok"]) == (False, True)
    assert results["a"]["status"].startswith("0, and what it left cannot be read: JSONDecodeError")


def test_a_report_is_whole_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness import report

    path = tmp_path / "report.json"
    assert report.load(path) == {}
    report.save(path, {"a": 1})
    monkeypatch.setattr(report.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        report.save(path, {"a": 2})
    assert report.load(path) == {"a": 1} and os.listdir(tmp_path) == ["report.json"]
    with pytest.raises(TypeError):
        report.save(path, {"a": object()})
    assert report.load(path) == {"a": 1}
    report.save(Path(os.devnull), {"a": 1})


@pytest.mark.parametrize("works", [True, False])
def test_timing_steps_have_the_chip_to_themselves(monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    """Samplings right after the tests; nothing without a build; each step in the report once."""
    import gpu

    done: list[set[str]] = []

    def do(run: Any, **todo: Any) -> bool:
        done.append(set(todo))
        assert all(step.seconds == {**gpu.SHARES, **gpu.VERSUS}[name] for name, step in todo.items())
        for name in todo:
            run.keep(name, dict(ok=works, status="0", seconds=1.0))
        return works

    monkeypatch.setattr(gpu.Run, "do", do)
    monkeypatch.setattr(gpu.steps, "environment", lambda: None)
    assert gpu.hardware(gpu.Run(gpu.Budget(560.0), None)) == int(not works)
    after = [set(gpu.BESIDE), {"sampling"}, {"op_times"}] if works else []
    assert done == [{"build"}, *after]
    done.clear()
    assert gpu.versus(gpu.Run(gpu.Budget(560.0), None), ROOT, ROOT, "--device", "cuda") == int(not works)
    assert done == [{"build"}, *([{"official"}, {"dit"}] if works else [])]


def test_the_second_command() -> None:
    import gpu_steps

    official = gpu_steps.official(Path("/a"), Path("/b"), "--device", "cuda").command
    assert [str(word) for word in official[1:]] == [
        "benchmarks/vs_official.py", "--official", "/a", "--no-memory", "--device", "cuda", "--folder", "/b",
    ]  # fmt: skip
    dit = gpu_steps.dit(Path("/b"), "--device", "cuda").command
    assert [str(word) for word in dit[1:]] == [
        "benchmarks/vs_dit.py", "--no-memory", "--device", "cuda", "--folder", "/b",
    ]  # fmt: skip


def test_what_pytest_counted(tmp_path: Path) -> None:
    import gpu_steps

    file = tmp_path / "tests.xml"
    file.write_text(
        "<testsuites><testsuite><testcase classname='c' name='a'/>"
        "<testcase classname='c' name='b'><skipped message='two GPUs are needed'/></testcase>"
        "<testcase classname='c' name='d'><failure message='got 2'>more</failure></testcase></testsuite></testsuites>"
    )
    counted = dict(ran=2, skipped={"b": "two GPUs are needed"}, failed={"c::d": "got 2"})
    assert gpu_steps._counted(file, dict(ok=False), "") == dict(ok=False, **counted)
    assert gpu_steps._counted(file, dict(ok=True), "") == dict(ok=True, **counted)
    assert not gpu_steps._counted(tmp_path / "none.xml", dict(ok=True), "")["ok"]  # nothing ran


# ---------------------------------------------------------------------- sanitizers


def test_a_missing_sanitizer_is_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_steps
    from gpu_runner import Budget, together

    monkeypatch.setattr(gpu_steps.shutil, "which", lambda *_, **__: None)
    todo = {"memcheck": gpu_steps.sanitizer("memcheck")}
    result = together(todo, Budget(60.0), tmp_path, lambda *_: None)["memcheck"]
    assert not result["ok"] and "'compute-sanitizer'" in result["status"]


@pytest.mark.parametrize(
    ("tool", "said", "ok"),
    [
        ("memcheck", "========= ERROR SUMMARY: 0 errors", True),
        ("memcheck", "no such device", False),
        ("memcheck", "=========     at void var_ext::cuda::k<int>(P)+0x10\n========= ERROR SUMMARY: 1 error", False),
        ("memcheck", "=========     at void at::native::k<int>(P)+0x10\n========= ERROR SUMMARY: 1 error", False),
        ("racecheck", "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True),
        ("racecheck", "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", False),
        ("initcheck", "========= ERROR SUMMARY: 0 errors", True),
        ("initcheck", "=========     at void at::native::k<int>(P)+0x10\n========= ERROR SUMMARY: 1 error", True),
        ("initcheck", "=========     at var_ext::cuda::(anonymous namespace)::k(P)\n========= ERROR SUMMARY: 1 error",
         False),
        ("initcheck", "========= ERROR SUMMARY: 1 error", False),
    ],
)  # fmt: skip
def test_a_sanitizer_must_have_looked(tool: str, said: str, ok: bool) -> None:
    import gpu_steps

    result = gpu_steps.looked(tool, dict(ok=True), said)
    assert result["ok"] == ok
    assert not gpu_steps.looked(tool, dict(ok=False), said)["ok"]
    assert all(name.endswith("::k") for name in result["places"])


def test_initcheck_sees_all_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch wrote must count as written; the other tools look at this project's kernels alone."""
    import gpu_steps

    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho '--kernel-regex'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    filters = {name: "--kernel-regex" in gpu_steps.sanitizer(name).command for name in gpu_steps.SANITIZERS}
    assert filters == {"memcheck": True, "racecheck": True, "initcheck": False}
    assert gpu_steps.ptx().environment["CUDA_FORCE_PTX_JIT"] == "1"
    assert (
        "--config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=90a-real;90-virtual"
        in gpu_steps.build("90a").command
    )


def test_every_op_has_its_turn_before_a_tool_runs_out_of_time() -> None:
    """Few cases of each test, the files in turns; what would begin too late is skipped, so that the tool reports."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]

    def said(*arguments: str, **variables: str) -> list[str]:
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout.splitlines()

    few = dict(VAR_EXT_GPU_TESTS="hardware", VAR_EXT_GPU_CASES="1")
    lines = said("tests/cuda", "-k", "hardware", "--collect-only", **few)
    files = [line.partition("::")[0] for line in lines if "::" in line]
    assert len(set(files[: len(set(files))])) == len(set(files)) >= len(ops.__all__)
    late = said("tests/cuda/test_ptx.py", VAR_EXT_GPU_TESTS="emulated", VAR_EXT_GPU_SECONDS="-1")
    assert late[-1].startswith("4 skipped")


# ---------------------------------------------------------------------- timing of ops


def op_file(shapes: int, *competitors: str) -> Any:
    from harness.case import Case

    def case(n: int) -> Case:
        return Case({name: lambda: torch.ones(2) for name in ("var_ext", "reference", *competitors)})

    given = {f"shape {n}": dict(n=n) for n in range(shapes)}
    return SimpleNamespace(SMOKE=dict(n=-1), GPU_SHAPES=given, case=case)


def ordered(files: dict[str, Any], apart: bool = True) -> list[Any]:
    from harness.jobs import jobs

    return jobs({op: (file, file.GPU_SHAPES) for op, file in files.items()}, apart=apart)


def test_the_first_shape_of_every_op_comes_first_and_compilers_last() -> None:
    files = {"a": op_file(3, "torch.compile"), "b": op_file(1), "c": op_file(2, "FlexAttention")}
    plain = ["a, shape 0", "b, shape 0", "c, shape 0", "a, shape 1", "c, shape 1", "a, shape 2"]
    assert [str(job) for job in ordered(files, apart=False)] == plain
    assert [str(job) for job in ordered(files)] == [
        *plain, *(f"{job}, compiled" for job in plain if not job.startswith("b")),
    ]  # fmt: skip


def race_of(monkeypatch: pytest.MonkeyPatch, seconds_each: float, out: Path, broken: str = "") -> bool:
    """`measured` on two ops, with a clock of its own: the budget is 10 s."""
    import time_ops
    from harness.clock import Rehearsal

    clock = [0.0]
    monkeypatch.setattr(time_ops.time, "monotonic", lambda: clock[0])
    file = op_file(2, "torch.compile")
    built = file.case

    def case(n: int) -> Any:
        clock[0] += seconds_each
        if broken == f"shape {n}":
            raise RuntimeError("no such shape")
        return built(n)

    file.case = case
    timer = time_ops.Timer(
        Rehearsal(torch.device("cpu")), dict.fromkeys(("copy", "bf16", "fp16", "fp32"), 1e9)
    )
    return time_ops.measured(timer, ordered(dict.fromkeys(("adaln", "bias_gelu"), file)), 10.0, out)


def test_what_there_is_no_time_for_is_listed_and_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "op_times.json"
    assert race_of(monkeypatch, 3.0, out)
    report = json.loads(out.read_text())
    assert [(row["op"], row["shape"]) for row in report["rows"]] == [
        (op, f"shape {n}") for n in range(2) for op in ("adaln", "bias_gelu")
    ]
    assert list(report["left_out"]) == [
        f"{op}, shape {n}, compiled" for n in range(2) for op in ("adaln", "bias_gelu")
    ]
    assert set(report["left_out"].values()) == {"no time left after 10 s"} and report["failed"] == {}


def test_compilers_join_the_row_of_their_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "op_times.json"
    assert race_of(monkeypatch, 0.0, out)
    report = json.loads(out.read_text())
    assert len(report["rows"]) == 4 and not report["left_out"]
    assert all(list(r["competitors"]) == ["var_ext", "reference", "torch.compile"] for r in report["rows"])


def test_a_shape_that_fails_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "op_times.json"
    assert not race_of(monkeypatch, 0.0, out, "shape 1")
    report = json.loads(out.read_text())
    assert len(report["rows"]) == 2 and not report["left_out"]
    assert report["failed"]["adaln, shape 1"] == "RuntimeError: no such shape"
    assert not race_of(monkeypatch, 20.0, out, "shape 0")  # nothing was timed


# ---------------------------------------------------------------------- sampling and occupancy


def test_samplings_of_a_toy(tmp_path: Path) -> None:
    out = tmp_path / "sampling.json"
    done = run("gpu_sampling", "--smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert [(row["who"], row["batch"]) for row in report["rows"]] == [
        ("graph", 1), ("eager", 1), ("graph", 2), ("eager", 2),
    ]  # fmt: skip
    for row in report["rows"]:
        assert len(row["seconds"]) == 5 and row["memory"]["peak"] > 0 and row["error"] is None
    parts = {name: len(seconds) for name, seconds in report["rows"][1]["parts"].items()}
    assert parts == dict(transformer=4, draw=4, step=4, decoder=1)
    assert list(report["rows"][0]["parts"]) == ["gpu"] and report["rows"][0]["host"] > 0
    (profile,) = report["profiles"]
    assert profile["batch"] == 1 and profile["launches"] > 0
    assert profile["busy"] >= sum(kernel["seconds"] for kernel in profile["kernels"]) > 0
    assert not report["left_out"] and not report["failed"]


def test_samplings_that_there_is_no_time_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import gpu_sampling

    out = tmp_path / "sampling.json"
    monkeypatch.setattr(sys, "argv", ["gpu_sampling.py", "--smoke", "--seconds", "-1", "--out", str(out)])
    assert gpu_sampling.main() == 1  # no figure at all
    assert list(json.loads(out.read_text())["left_out"]) == ["batch 1", "batch 2", "kernels at batch 1"]


class Driver:
    """A driver with two kernels in each image; the second holds fewer blocks than it should."""

    def functions(self, image: bytes) -> list[int]:
        assert len(image) == 16 + 24
        return [0, 1]

    def symbol(self, function: int) -> str:
        return ("_ZN7var_ext4cuda20sample_tokens_kernelENS_18SampleTokensParamsE", "_Z14unknown_kernelv")[
            function
        ]

    def attribute(self, function: int, which: int) -> int:
        return which

    def blocks(self, function: int, threads: int, shared: int) -> int:
        self.asked = threads, shared
        return 0


def test_occupancy_stands_beside_the_plan() -> None:
    import gpu_occupancy

    image = gpu_occupancy.HEADER.pack(0xBA55ED50, 1, 16, 24) + bytes(24)
    module = b"\x7fELF" + image + bytes(100) + image + b"end"
    assert gpu_occupancy.images(module) == [image, image]
    driver = Driver()
    rows = list(gpu_occupancy.rows(driver, module))
    (budget,) = gpu_occupancy.compiled.budgets()["sample_tokens_kernel"]
    assert driver.asked == (budget.threads, budget.shared)
    assert len(rows) == 4
    assert rows[0] | dict(planned=budget.blocks, blocks=0, wrong="fewer blocks than planned") == rows[0]
    assert rows[1]["wrong"] == "no plan"
    assert {plan["kernel"] for plan in gpu_occupancy.plans()} >= {"sample_tokens_kernel<>"}


# ---------------------------------------------------------------------- the programs


def test_the_plan_for_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every op has shapes for a GPU, and their sizes are known without one."""
    import time_ops

    monkeypatch.setattr(sys, "argv", ["time_ops.py", "--plan"])
    assert time_ops.main() == 0
    lines = capsys.readouterr().out.splitlines()
    planned = [line.partition(",")[0] for line in lines]
    known = set(ops.__all__) - LEFT_TO_TORCH["cuda"]
    assert set(planned[: len(known)]) == known and planned[0] == "block_causal_attention"
    (line,) = (x for x in lines if "32 x 680 x 16 x 64, forward, bf16" in x)
    assert "178.3 MB, 37.5 GFLOP, 1 launches, 59.4 us at least on an H100" in line
    assert "FlexAttention" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would run")
@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("gpu", ()),
        ("gpu", ("--official", ".")),
        ("time_ops", ("--device", "cuda")),
        ("gpu_sampling", ("--out", os.devnull)),
    ],
)
def test_without_a_gpu_nothing_is_timed(program: str, arguments: tuple[str, ...]) -> None:
    done = run(program, *arguments)
    assert done.returncode == 1
    assert "here is no GPU" in done.stderr
