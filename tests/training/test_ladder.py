"""python/scaling: images seen once, none twice; runs of the trainer as rows of a table; workers and stages."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock

from tests.programs import program_at
from var_ext.checkpoints import load_tokenizer
from var_ext.scaling import read_runs
from var_ext.training.stored_tokens import StoredTokens, TokenData

STYLES = ("a", "b", "c")
NAMES = ("loss_avg", "loss_last", "err_avg", "err_last")


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    """With pictures that need no node, of which every fourth is drawn again later."""
    with program_at("scaling/ladder.py") as module, pytest.MonkeyPatch.context() as patch:
        source = sys.modules["source"]

        def render(command: list[str], **_: Any) -> Any:
            split, count, first = command[4].removeprefix("--"), int(command[5]), int(command[7])
            side = int(command[9])
            images = []
            for index in range(first, first + count):
                seed = 0 if index % 4 == 0 else index + 10_000 * (split == "val")
                images += list(np.random.default_rng(seed).integers(0, 256, (3, side, side, 3), np.uint8))
            labels = np.tile(np.arange(3), count)
            np.savez(command[3], **{f"{split}_images": np.array(images), f"{split}_labels": labels})  # type: ignore[arg-type]
            return type("Done", (), {"returncode": 0})

        patch.setattr(source.subprocess, "run", render)
        patch.setattr(source, "STYLES", STYLES)
        patch.setattr(module, "STYLES", STYLES)
        patch.setattr(source.make_tokens, "__kwdefaults__", {"part": 40})
        yield module


def call(program: ModuleType, work: Path, tokenizer: Path, *more: str) -> str:
    words = ["--work", str(work), "--tokenizer", str(tokenizer), "--depths", "1,2", "--images", "300"]
    result = CliRunner().invoke(program.main, [*words, "--held-out", "20", *more])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def done(program: ModuleType, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("ladder")
    assert "done: 7 of 7 runs" in call(program, work, tokenizer)
    return work


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_no_image_is_there_twice(done: Path, tokenizer: Path) -> None:
    vae = load_tokenizer(tokenizer)
    rows = []
    for split, count in (("train", 256), ("val", 20)):
        data = TokenData(f"tokens:{done / 'tokens'}", split, vae)
        assert len(data) == count and data.class_names == list(STYLES)
        ((tokens, labels),) = StoredTokens(vae, data).feed(0, [torch.arange(count)])
        assert labels.bincount().min() > 0
        rows += tokens.tolist()
    assert len({tuple(row) for row in rows}) == len(rows) == 276


def test_a_run_is_a_row_and_a_validation_too(done: Path, program: ModuleType) -> None:
    rows, probes, curves = (table(done / f"{name}.csv") for name in ("scaling", "probes", "curves"))
    assert [row["run"] for row in rows] == ["d1-seed0", "d2-seed0", "d2-seed1", "d2-seed2"]
    assert [row["run"] for row in probes] == [f"d2-seed0-rate{factor}" for factor in ("0.5", "1", "2")]
    whole = rows[2]
    mine = [row for row in curves if row["run"] == "d2-seed1"]
    assert [row["step"] for row in mine] == ["1", "2", "3", "4"] and mine[-1]["loss_avg"] == whole["loss_avg"]
    assert int(mine[0]["flops"]) * 4 == int(whole["flops"]) and whole["images"] == "256"
    assert int(whole["parameters"]) == 18 * 2 * 64**2 and int(whole["tokens"]) == 256 * 21
    assert float(whole["err_avg"]) <= 100
    losses = np.stack([np.load(done / row["run"] / "losses.npy") for row in rows])  # (runs, images, 4)
    assert losses[2].mean(0) == pytest.approx([float(whole[name]) for name in NAMES], rel=1e-4)
    apart = losses[2, :, 0] - losses[:, :, 0].mean(0)
    assert float(whole["loss_avg_se"]) == pytest.approx(apart.std(ddof=1) / 20**0.5, rel=1e-6)
    rates = {row["run"]: float(row["rate"]) for row in rows + probes}
    assert rates["d2-seed0"] == pytest.approx(2e-3) and rates["d2-seed0-rate0.5"] == pytest.approx(1e-3)
    assert rates["d1-seed0"] == pytest.approx(2e-3 * 2**0.5)


def test_the_fitter_reads_them(done: Path) -> None:
    for name, points in (("scaling", 1), ("curves", 4)):
        runs = read_runs(done / f"{name}.csv")
        assert {len(run.values["flops"]) for run in runs.runs} == {points}
        assert [len(rung.runs) for rung in runs.rungs()] == [1, 3]
        assert set(runs.losses) >= {"loss_avg", "loss_last", "err_avg", "err_last", "loss_s1", "err_s3"}
    assert read_runs(done / "scaling.csv").has("loss_avg_se")


def test_finished_runs_and_tokens_are_kept_and_another_worker_is_left_alone(
    program: ModuleType, done: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "train_var", None)
    assert "done: 7 of 7 runs" in call(program, done, tokenizer, "--largest-first")
    (done / "d2-seed2" / "rows.json").rename(done / "away")
    with FileLock(done / "d2-seed2.lock"):
        assert "6 of 7 runs" in call(program, done, tokenizer)
    (done / "away").rename(done / "d2-seed2" / "rows.json")


def test_a_dry_run_predicts_and_trains_nothing(program: ModuleType, tokenizer: Path, tmp_path: Path) -> None:
    output = call(program, tmp_path, tokenizer, "--dry-run")
    assert "h of one worker in all" in output and len(output.splitlines()) == 8
    assert not (tmp_path / "scaling.csv").exists() and not (tmp_path / "tokens").exists()


def test_refuses(program: ModuleType, done: Path, tokenizer: Path, images: Path, tmp_path: Path) -> None:
    """Another ladder in the same folder would be a mixture of both."""
    for words, message in (
        (["--images", "600"], "of a ladder with images 256, got 512: give the same, or another --work"),
        (["--held-out", "30"], "held_out 20, got 30"),
        (["--rate", "0.1"], "rate 0.002, got 0.1"),
        (["--tokenizer", "digits"], "of a ladder with tokenizer"),
        (["--tokenizer", str(images)], "config.json"),
        (["--depths", "two"], "two"),
        (["--depths", "0", "--work", str(tmp_path)], "depth must be at least 1"),
        (["--rate", "-1"], "-1"),
    ):
        before = ["--work", str(done), "--tokenizer", str(tokenizer), "--images", "300", "--held-out", "20"]
        result = CliRunner().invoke(program.main, [*before, *words])
        assert result.exit_code in (1, 2) and message in result.output, (words, result.output)
        assert isinstance(result.exception, SystemExit)
