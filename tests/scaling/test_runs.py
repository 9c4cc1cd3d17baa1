"""Tables of anyone's: columns in any order and of many names, with units; and one clear line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.scaling.tables import write
from var_ext.scaling import read_runs


def table(folder: Path, header: str, *rows: str, delimiter: str = ",") -> Path:
    return write(folder / "runs.csv", header.split(","), [row.split(",") for row in rows], delimiter)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_of_another_program(tmp_path: Path, delimiter: str) -> None:
    """Other names, another order, units in headers."""
    path = table(
        tmp_path,
        "Val Loss,notes,flops_P,params [M],Error (fraction),tokens (billions),L last [bits],loss scale 3",
        "3.1,a,2,0.5,0.71,0.1,2,1.5",
        "2.9,b,8,2,0.66,0.1,1,1.25",
        delimiter=delimiter,
    )
    runs = read_runs(path)
    assert runs.losses == ("loss_avg", "err_avg", "loss_last", "loss_s3")
    assert runs.ignored == ("notes",)
    small = runs.runs[0]
    assert small.size == 5e5 and small.last("flops") == 2e15 and small.last("tokens") == 1e8
    assert small.last("err_avg") == pytest.approx(71) and small.last("loss_last") == pytest.approx(
        2 * np.log(2)
    )


def test_columns_that_are_chosen(tmp_path: Path) -> None:
    path = table(tmp_path, "width,nll,loss,work", "1,3,9,1", "2,2,9,2")
    runs = read_runs(path, {"size": "width:M", "loss_avg": "nll", "flops": "work:PFLOP"})
    assert [run.size for run in runs.runs] == [1e6, 2e6]
    assert runs.runs[0].last("loss_avg") == 3 and runs.runs[0].last("flops") == 1e15
    assert runs.losses == ("loss_avg",)


@pytest.mark.parametrize(
    ("text", "factor"),
    [("params_M", 1e6), ("N (millions)", 1e6), ("Parameters [B]", 1e9), ("n", 1), ("size [k params]", 1e3)],
)
def test_units_of_sizes(tmp_path: Path, text: str, factor: float) -> None:
    runs = read_runs(table(tmp_path, f"{text},loss", "1,3", "2,2"))
    assert runs.runs[0].size == factor


@pytest.mark.parametrize("text", ["flops_P", "PFLOPs", "C [PFLOP]", "compute (P)", "Training FLOPs [P]"])
def test_units_of_compute(tmp_path: Path, text: str) -> None:
    runs = read_runs(table(tmp_path, f"n,loss,{text}", "1,3,1", "2,2,2"))
    assert runs.runs[0].last("flops") == 1e15


def test_rows_of_a_run_are_its_curve(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "size,seed,step,loss",
        "1,0,20,2.0", "1,0,10,3.0", "2,0,10,2.5", "2,0,20,1.5", "1,1,10,3.1", "1,1,20,2.1",
    )  # fmt: skip
    runs = read_runs(path)
    assert len(runs.runs) == 3
    assert [list(run.values["loss_avg"]) for run in runs.runs] == [[3.0, 2.0], [3.1, 2.1], [2.5, 1.5]]
    assert [(rung.size, len(rung.runs)) for rung in runs.rungs()] == [(1, 2), (2, 1)]
    assert runs.rungs()[0].mean("loss_avg") == pytest.approx(2.05)


def test_trainings_of_other_lengths_are_no_seeds(tmp_path: Path) -> None:
    path = table(tmp_path, "run,size,tokens,loss", "a,1,10,3", "b,1,20,2.5", "c,2,10,2", "d,2,10,2.1")
    assert [(rung.size, len(rung.runs)) for rung in read_runs(path).rungs()] == [(1, 1), (1, 1), (2, 2)]


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("n,loss", [], "must have a header and a row a run, got 1 lines"),
        ("n,loss", ["1,nan", "2,2"], "row 2: 'loss' must be finite and positive, got nan"),
        ("n,loss", ["1,3", "2,inf"], "row 3: 'loss' must be finite and positive, got inf"),
        ("n,loss", ["-1,3", "2,2"], "row 2: 'n' must be finite and positive, got -1"),
        ("n,loss", ["0,3", "2,2"], "row 2: 'n' must be finite and positive, got 0"),
        ("n,loss", ["1M,3", "2,2"], "must be a number, got '1M'; units belong into the header"),
        ("n,loss", ["1,", "2,2"], "row 2: 'loss' must be a number, got ''"),
        ("n,loss", ["1,3,4", "2,2"], "row 2: must have the 2 cells of the header, got 3"),
        ("n,seed,loss", ["1,0,3", "1,1,2"], "needs runs of several sizes, got only 1 parameters"),
        ("n,loss", ["1,2.5", "2,2.5"], "every run has the same loss in loss_avg"),
        ("n,loss", ["1,3", "2,2", "1,3"], r"row 4 repeats row 2 \(run 1\): .*by a column seed"),
        ("n,seed,step,loss", ["1,0,5,3", "2,0,5,2", "2,0,5,2"], "row 4 repeats row 3"),
        ("run,n,step,loss", ["a,1,1,3", "a,2,2,2"], "run a has rows of several sizes"),
        ("width,loss", ["1,3"], "lacks the size of its runs: .*--column size=HEADER; the columns are 'width', 'loss'"),
        ("n,nll", ["1,3"], "has no loss: .*--column loss_avg=HEADER; the columns are 'n', 'nll'"),
        ("n,loss,L avg", ["1,3,3"], "both 'loss' and 'L avg' are loss_avg: choose with --column loss_avg=HEADER"),
        ("n [furlongs],loss", ["1,3"], "the unit 'furlongs' of column 'n \\[furlongs\\]' is not known"),
        ("n,err", ["1,.7", "2,.6"], "no unit and no value above 1: write its header as 'err_avg \\[%\\]'"),
        ("n,loss,loss_last_se", ["1,3,.1"], "has loss_last_se but no loss_last"),
    ],
)  # fmt: skip
def test_what_is_wrong(tmp_path: Path, header: str, rows: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read_runs(table(tmp_path, header, *rows))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"size": "breadth"}, "no column 'breadth' for size: there are 'n', 'loss'"),
        ({"height": "n"}, "must be chosen as one of size, flops, .*got 'height'"),
        ({"size": "n:furlongs"}, "the unit 'furlongs' of column 'n' is not known"),
    ],
)
def test_columns_that_are_chosen_wrongly(tmp_path: Path, columns: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_runs(table(tmp_path, "n,loss", "1,3", "2,2"), columns)


def test_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"could not read .*No such file"):
        read_runs(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="got 0 lines"):
        read_runs(tmp_path / "empty.csv")
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"could not read .*decode"):
        read_runs(tmp_path / "picture.csv")
