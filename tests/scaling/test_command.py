"""`var-ext scaling`: what it prints and writes, and one line for every bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from tests.scaling.tables import curves, ladder, write
from var_ext.cli import main


def call(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["scaling", *map(str, words)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Every loss of a ladder, in another order than that of the documentation, with units."""
    rows = [
        [loss, size / 1e6, flops / 1e15, seed, 20 * loss, loss + 0.5, 0.65, loss]
        for size, seed, loss, _, flops in ladder()  # type: ignore[misc]
    ]
    header = ["Loss avg", "params (M)", "flops_P", "seed", "err [%]", "L last", "L s1", "loss_s2"]
    return write(tmp_path / "runs.csv", header, rows)


def test_fit_prints_a_verdict_for_every_loss(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page"
    code, said = call("fit", table, "--out", out, "--irreducible", "1.2", "--draws", 200)
    assert code == 0, said
    for name in ("loss_avg", "loss_last", "err_avg", "loss_s2"):
        assert said.count(f"\n| {name} |") == (4 if name == "loss_avg" else 2)  # N and C, and a given E
    assert "1.2, given" in said and "loss_avg with E = 1.2 does not hold: " in said
    assert "loss_s1: every run has 0.65" in said
    assert "N in billion parameters" in said and "C in PFLOP" in said
    assert "4 degrees of freedom" in said
    page = (out / "scaling.md").read_text()
    for picture in ("scaling-n.png", "scaling-c.png"):
        assert f"]({picture})" in page
        with Image.open(out / picture) as image:
            assert image.width > 600
    assert "Published, on ImageNet" in page and "| loss_last | N | 4.5 | 0.23 | 2 |" in page
    found = json.loads((out / "scaling.json").read_text())
    first = found["fits"][0]
    assert (first["loss"], first["against"], first["verdict"]) == ("loss_avg", "size", "holds")
    low, high = first["intervals_90"]["alpha"]
    assert low < first["alpha"] < high
    assert {check["name"] for check in first["checks"]} == {
        "sizes", "range", "correlation", "curvature", "residuals", "prediction",
    }  # fmt: skip


def test_the_same_draws_give_the_same_figures(table: Path) -> None:
    words = ("fit", table, "--draws", 100)
    assert call(*words, "--seed", 1) == call(*words, "--seed", 1)
    assert call(*words, "--seed", 1) != call(*words, "--seed", 2)


def test_fit_without_compute_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "runs.csv", ["N", "loss"], [[row[0], row[2]] for row in ladder()[2::3]][:1] + [
        [row[0], row[2]] for row in ladder()[5:]
    ])  # fmt: skip
    code, said = call("fit", path, "--draws", 100)
    assert code == 0 and "Against compute" not in said
    assert "no law against compute: the table has no FLOP; name a column flops" in said
    assert "Noise of runs: loss_avg without seeds and standard errors" in said


def test_plan(tmp_path: Path) -> None:
    header = ["run", "size", "seed", "step", "images", "flops", "loss_avg"]
    path = write(tmp_path / "runs.csv", header, curves(2e10))
    code, said = call("plan", "--flops", "1e18", path, "--draws", 100)
    assert code == 0, said
    assert said.startswith("1e+18 FLOP, by ") and "\n  parameters " in said and "\n  images " in said
    assert "warning: 4.43 times above" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--irreducible", "5.0"], "E of loss_avg must be in [0, 1.9"),
        (["--irreducible", "loss_s9=1"], "E was given for loss_s9: there are loss_avg"),
        (["--irreducible", "loss_avg=much"], "must be a number or NAME=NUMBER, got 'loss_avg=much'"),
        (["--irreducible", "1", "--irreducible", "loss_avg=2"], "loss_avg was given twice: 1 and 2"),
        (["--column", "size"], "must be NAME=VALUE, got 'size'"),
        (["--column", "size=breadth"], "no column 'breadth' for size: there are 'Loss avg', 'params (M)'"),
        (["--before-anneal", "2"], "2.0 is not in the range"),
        (["--draws", "3"], "3 is not in the range"),
    ],
)
def test_bad_options(table: Path, words: list[str], message: str) -> None:
    code, said = call("fit", table, *words)
    assert code != 0 and message in " ".join(said.split()) and "Traceback" not in said


def test_two_sizes_are_no_ladder(tmp_path: Path) -> None:
    code, said = call("fit", write(tmp_path / "runs.csv", ["n", "loss"], [[1, 3], [2, 2]]))
    assert code == 1 and "a law needs at least 3 sizes, got 2" in said


def test_a_plan_needs_a_budget_that_is_one(table: Path) -> None:
    code, said = call("plan", table, "--flops", "nan", "--draws", 100)
    assert code == 1 and "a budget must be a positive number of FLOP, got nan" in said


def test_no_plots_without_matplotlib(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("var_ext.scaling.page.installed", lambda: False)
    assert call("fit", table, "--out", tmp_path / "page", "--draws", 100)[0] == 0
    assert "pip install 'var_ext[plots]'" in (tmp_path / "page" / "scaling.md").read_text()
