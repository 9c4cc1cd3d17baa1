"""What `make gpu` leaves, and the page of it: steps, samplings, op timings, predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


ABOUT = dict(
    chip="NVIDIA H100 80GB HBM3", architecture="sm_90a", commit="0123456789abcdef", dirty=False, driver="1.2",
    cuda="13.0", nvcc="13.0", torch="2.11", sources="fedcba", date="2026-01-02T03:04:05+00:00",
    threads=16, load=1.5, python="3.11",
)  # fmt: skip


def result() -> dict[str, Any]:
    """As the hardware command writes it: one shape, one competitor that could not be captured, one that failed."""
    import gpu

    slow = dict(gbps=1.0, tflops=1.0, of_ceiling=0.1, spread=0.0, call_us=30.0, graph_us=None)
    figures = dict(gbps=1500.0, tflops=20.5, of_ceiling=0.5, spread=0.01, call_us=20.0, graph_us=10.0)
    row = dict(
        op="qk_norm", shape="2 x 3, bf16", kernel="native", flops=1, roofline_us=4.0,
        competitors={"var_ext": figures, "reference": slow, "torch.compile": dict(error="RuntimeError: no")},
    )  # fmt: skip
    steps: dict[str, Any] = {name: dict(ok=True, status="0", seconds=1.0) for name in gpu.SHARES}
    steps["tests"] |= dict(ran=7, skipped={"a": "no"}, failed={})
    steps["occupancy"] |= dict(kernels=[dict(kernel="a"), dict(kernel="b", wrong="no plan")])
    steps["initcheck"] |= dict(summary="ERROR SUMMARY: 3 errors", places={"at::native::k": 3})
    steps["op_times"] |= dict(
        rows=[row, *attention(170.0, 700.0)], left_out={"adaln, 1 x 1": "no time left"}, failed={},
        ceilings={"copy": 3e12, "bf16": 7e14},
    )  # fmt: skip
    drawn = [
        dict(who=who, batch=1, seconds=[0.009], parts=parts, error=None, memory=dict(peak=2e9), limit_ms=2.4)
        for who, parts in (
            ("graph", dict(gpu=[0.008])),
            ("eager", dict(transformer=[0.002, 0.003], decoder=[0.1])),
        )
    ]
    drawn[0]["host"] = 0.001
    lost = dict(who="graph", batch=50, seconds=[], parts={}, error="out of memory", memory=dict(peak=0))
    kernel = dict(name="var_ext::k<int>", calls=160, seconds=1e-3)
    profile = dict(batch=1, launches=1380, busy=0.008, seconds=0.009, ours=0.003, kernels=[kernel])
    steps["sampling"] |= dict(
        depth=16,
        precision="bf16",
        rows=[*drawn, lost],
        profiles=[profile],
        left_out={},
        failed={"kernels": "no"},
    )
    return {"about": ABOUT, **steps}


def attention(forward: float, both: float) -> list[dict[str, Any]]:
    """The rows that were predicted, in microseconds."""
    figures = dict(gbps=1.0, tflops=1.0, of_ceiling=0.5, spread=0.01, call_us=999.0)
    return [
        dict(
            op="block_causal_attention", shape=f"32 x 680 x 16 x 64, {way}, bf16", kernel="native", flops=flops,
            roofline_us=4.0, competitors={"var_ext": {**figures, "graph_us": took}},
        )
        for way, flops, took in (("forward", 37.5e9, forward), ("forward + backward", 131.4e9, both))
    ]  # fmt: skip


def test_the_result_of_a_gpu() -> None:
    import gpu

    assert gpu.name_of(ABOUT) == "h100-80gb-hbm3-sm_90a-0123456789ab.json"
    assert gpu.name_of({**ABOUT, "dirty": True}) == "h100-80gb-hbm3-sm_90a-0123456789ab-dirty.json"
    assert gpu.name_of({**ABOUT, "commit": None, "dirty": None}) == "h100-80gb-hbm3-sm_90a-unknown.json"
    good = result()
    assert gpu.passed(good)
    for name in gpu.SHARES:
        assert not gpu.passed({key: value for key, value in good.items() if key != name})
        assert not gpu.passed({**good, name: {**good[name], "ok": False}})


def test_the_page_of_gpus(tmp_path: Path) -> None:
    """The newest result of a chip; none claims nothing."""

    import gpu_page

    def page() -> str:
        return gpu_page.section(tmp_path)

    assert "No result yet" in page()
    assert "| sampling d16, 256 px, bf16, batch 8 | 20 to 26 ms | not measured |  |" in page()
    report = result()
    older = {**report, "about": {**ABOUT, "date": "2025-01-01T00:00:00+00:00", "torch": "old"}}
    for name, content in (("a", report), ("b", older)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    text = page()
    assert "| 2 x 3, bf16 | 10.0 µs | 30.0 µs * |  | 3.00 | 3.00 | 1500 | 20.5 | 4.00 µs | 50% |" in text
    assert "torch 2.11" in text and "torch old" not in text
    assert "3.00 TB/s copied, 700 TFLOP/s bf16" in text
    assert "passed in 1 s: 7 tests, 1 skipped" in text
    assert "passed in 1 s: 1 of 2 kernels hold the blocks that were planned" in text
    assert "passed in 1 s: ERROR SUMMARY: 3 errors, in `at::native::k` |" in text
    assert "- adaln, 1 x 1: no time left" in text
    assert (
        "| graph, batch 1 | 9.00 ms | 9.00 ms | 8.00 ms | 1.00 ms |  |  |  |  | 2.4 ms | 27% | 2.00 GB |"
        in text
    )
    assert (
        "| eager, batch 1 | 9.00 ms | 9.00 ms | 105 ms |  | 5.00 ms |  |  | 100 ms | 2.4 ms | 27% | 2.00 GB |"
        in text
    )
    assert "| graph, batch 50 | out of memory |" in text and "- kernels: no" in text
    assert "Kernels at batch 1: 1380, 8.00 ms of 9.00 ms; those of var_ext 3.00 ms." in text
    assert "| `var_ext::k<int>` | 160 | 1.00 ms |" in text
    assert "bf16, batch 1 | 7.3 to 9.3 ms | 9 ms | 1.08 |" in text
    (tmp_path / "a.json").write_text(json.dumps({"about": ABOUT, "build": report["build"]}), encoding="utf-8")
    assert "| op_times | **not run** |" in page()


@pytest.mark.parametrize(
    ("forward", "both", "shown"),
    [
        (
            170.0,
            796.0,
            ("forward, bf16 | 210 to 275 TFLOP/s | 221 TFLOP/s | 0.91 |", "| 150 TFLOP/s | 0.83 |"),
        ),
        (230.0, 1500.0, ("| 163 TFLOP/s | 0.67 |", "| 73.9 TFLOP/s | 0.41 **missed** |")),
        (110.0, 796.0, ("| 341 TFLOP/s | 1.41 **missed** |", "| 137 TFLOP/s | 0.76 |")),
        (
            110.0,
            100.0,
            ("| 341 TFLOP/s | 1.41 **missed** |", "backward | 150 to 210 TFLOP/s | not measured |  |"),
        ),
    ],
)
def test_predictions_stand_beside_figures(forward: float, both: float, shown: tuple[str, str]) -> None:
    """The backward pass is what both take beyond one forward."""
    import gpu_page

    text = gpu_page.predictions({"op_times": {"rows": attention(forward, both)}})
    assert all(part in text for part in shown), text
