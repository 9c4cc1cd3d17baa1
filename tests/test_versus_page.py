"""The part of RESULTS.md beside other programs: tables and pictures from results as the programs write them."""

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
    chip="Some chip, 2 cores", threads=2, load=0.3, torch="2.13", python="3.11", var_ext="9.9", dirty=False,
    commit="0123456789abcdef", date="2026-01-02T03:04:05+00:00", diffusers="0.1",
)  # fmt: skip
SPLIT = {
    "transformer": [0.5, 1.0],
    "head and sampling": [0.1, 0.2],
    "quantizer": [0.1, 0.1],
    "decoder": [1.0],
}
MEMORY = dict(peak=2_500_000_000, resting=1_000_000_000)


def row(who: str, precision: str, seconds: list[float], **more: Any) -> dict[str, Any]:
    return (
        dict(who=who, precision=precision, batch=2, seconds=seconds, parts={}, error=None, memory=MEMORY)
        | more
    )


def reports() -> list[dict[str, Any]]:
    """As the three programs write them."""
    official = dict(
        kind="official", about=ABOUT, model=dict(depth=16, tiny=False), laps=3,
        answers=[
            dict(who="published", precision="fp32", forced=False, tokens=1.0, psnr=200.0),
            dict(who="var_ext", precision="bf16", forced=True, tokens=0.975, psnr=41.2),
        ],
        rows=[
            row("published", "fp32", [8.0, 9.0, 7.0], parts=SPLIT),
            row("published", "bf16", [4.0], parts=SPLIT),
            row("var_ext", "bf16", [2.0, 1.0, 4.0], parts=SPLIT, released=dict(peak=1_500_000_000)),
            row("var_ext", "int8", [1.6], memory=dict(error="killed")),
            row("var_ext", "fp32", [], error="out of memory", memory=None),
        ],
    )  # fmt: skip
    steps = {"250": 500.0, "50": 100.0}
    parts = dict(start=[0.1], step=[2.0, 2.0], decoder=[3.0])
    dit = dict(
        kind="dit", about=ABOUT, model=dict(depth=16, tiny=False), laps=2, linearity={"bf16": {"4": 1.01, "8": 0.99}},
        rows=[row("DiT", "bf16", [7.0], parts=parts, of_steps=steps), row("var_ext", "bf16", [4.0])],
    )  # fmt: skip
    flops = dict(transformer=600 * 10**9, decoder=350 * 10**9)
    cost = dict(
        kind="cost", about=ABOUT, model=dict(depth=16, tiny=False), laps=2,
        rows=[
            dict(depth=depth, batch=batch, precision="bf16", flops=flops, seconds=[depth * batch / 8.0], error=None)
            for depth, batch in ((2, 1), (16, 1), (16, 2))
        ],
    )  # fmt: skip
    timed = dict(forward=[0.5], loss=[0.25], backward=[1.0])
    training = dict(
        kind="training", about=ABOUT, model=dict(depth=8, tiny=False), laps=3,
        rows=[
            dict(who=who, precision="fp32", batch=4, depth=8, seconds=seconds, parts=timed, error=None)
            for who, seconds in (("published", [4.0, 3.0, 5.0]), ("var_ext", [2.0, 1.0, 2.5]))
        ],
    )  # fmt: skip
    return [official, dit, cost, training]


def test_the_page_beside_other_programs(tmp_path: Path) -> None:
    import versus_page

    plots = tmp_path / "plots"
    assert "No result yet" in versus_page.section(tmp_path, plots)
    for number, report in enumerate(reports()):
        (tmp_path / f"{number}.json").write_text(json.dumps(report), encoding="utf-8")
        older = {**report, "about": {**ABOUT, "date": "2025-01-01T00:00:00+00:00", "torch": "old"}}
        (tmp_path / f"{number}-old.json").write_text(json.dumps(older), encoding="utf-8")
    assert "![" not in versus_page.section(tmp_path, plots)
    versus_page.draw(versus_page.reports(tmp_path), plots)
    text = versus_page.section(tmp_path, plots)
    assert "old" not in text
    # the median of 2 s, two images, 1 s of it the decoder; twice the published bf16, four times its fp32
    assert (
        "| var_ext bf16 | 2.00 s | 1.00 s | 1.00 s | 2.00 | 4.00 | 2.50 GB | 1.50 GB | 1.00 GB | 150% |"
        in text
    )
    assert "| var_ext int8 | 1.60 s | 800 ms |  | 2.50 | 5.00 | killed |  | killed | 0% |" in text
    assert "| var_ext fp32 | out of memory |" in text
    # twice by the medians, three times by the fastest laps
    assert "| d8, batch 4, fp32 | var_ext | 2.00 s | 2.00 | 3.00 | 500 ms | 250 ms | 1.00 s | 75% |" in text
    assert "| transformer, all scales | 1.50 s | 1.50 s | 1.50 s |" in text
    assert (
        "| var_ext bf16 | 97.50% | 41 dB |" in text
        and "| published fp32 | 100.00%, on its own | equal |" in text
    )
    assert (
        "| bf16, batch 2 | 1.00 s | 1.50 s | 250 s | 50.0 s | 2.00 s | 125.0 | 25.0 | 2.50 GB | 2.50 GB |"
        in text
    )
    assert "bf16: runs of 4 and 8 steps took 1.01 and 0.99 of the seconds so predicted." in text
    assert "| d16, bf16 | 2 | 4.00 s | 2.00 s | 950 | 475 | 0% |" in text
    drawn = sorted(plots.iterdir())
    assert [path.name for path in drawn] == [
        f"{kind}-some-chip-2-cores.svg" for kind in ("cost", "dit", "official")
    ]
    for path in drawn:
        assert f"](plots/{path.name})" in text and path.stat().st_size < 100_000
    first = [path.read_bytes() for path in drawn]
    versus_page.draw(versus_page.reports(tmp_path), plots)
    assert [path.read_bytes() for path in drawn] == first


def test_the_page_says_how_a_run_on_a_gpu_went() -> None:
    import versus_page

    report = reports()[0]
    assert "TF32" not in versus_page.facts(report) and "stopped" not in versus_page.facts(report)
    text = versus_page.facts({**report, "tf32": dict(answers=False, time=True), "finished": False})
    assert "| TF32 | answers compared without it; timed as torch does by itself, in convolutions |" in text
    assert "| **stopped** | before its end; what it had stands here |" in text
