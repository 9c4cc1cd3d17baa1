"""Rejection sampling from the command line: what is kept, printed and recorded; one line for every bad input."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import var_ext
from tests.evaluation.test_efficientnet_lite0 import random_network
from tests.test_cli import run
from tests.tiny import tiny
from var_ext.checkpoints import save_model
from var_ext.evaluation import Likelihood


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return str(save_model(folder, *tiny(), sampling={"cfg": 1.5, "top_k": 8, "top_p": 0.9}))


def test_the_best_one_by_one(model: str, tmp_path: Path) -> None:
    options = ("--model", model, "--labels", "4,1", "--count", 2, "--seed", 7, "--batch-size", 4)
    out = tmp_path / "a.npz"
    result = run("sample", *options, "--keep", 0.25, "--score", "likelihood", "--out", out)
    assert (
        "kept 4 of 16 candidates (25%): mean likelihood -" in result.stdout and ", of all -" in result.stdout
    )
    assert f"of {model}, seeds 7-22: {out}" in result.stdout
    assert "candidates: 100%" in result.stderr and "images: 100%" in result.stderr
    sampler = var_ext.load(model)
    best = sampler.best_of([4, 1] * 8, range(7, 23), Likelihood(sampler), 0.25)
    plan = json.loads((tmp_path / "a.npz.plan.json").read_text())
    assert plan["labels"] == [4, 1, 4, 1] and sorted(plan["seeds"]) == sorted(best.seeds.tolist())
    assert plan["selection"]["keep"] == 0.25 and plan["selection"]["candidates"] == 16
    assert plan["selection"]["score"] == {"name": "likelihood", "digest": Likelihood(sampler).digest}
    assert np.load(out)["arr_0"].shape == (4, 8, 8, 3)
    again = run("sample", *options, "--keep", 0.25, "--score", "likelihood", "--out", out)
    assert again.stdout == result.stdout and not again.stderr  # all there
    for other, message in (
        (("--keep", 0.5), "selection.keep: 0.25 there, 0.5 now"),
        (("--candidates", 8), "selection.keep: 0.25 there, 2 now"),
    ):
        assert (
            message in run("sample", *options, *other, "--score", "likelihood", "--out", out, code=1).output
        )
    assert "selection: {" in run("sample", *options, "--out", out, code=1).output


def test_candidates_say_the_same_the_other_way_round(model: str, tmp_path: Path) -> None:
    options = ("--model", model, "--count", 2, "--score", "likelihood", "--quiet")
    run("sample", *options, "--keep", 0.25, "--out", tmp_path / "a.npz")
    run("sample", *options, "--candidates", 8, "--out", tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert json.loads((tmp_path / "b.npz.plan.json").read_text())["selection"]["keep"] == 2


def test_a_grid_of_the_best(model: str, tmp_path: Path) -> None:
    options = ("--model", model, "--labels", "4,1", "--count", 2, "--seed", 3, "--batch-size", 4)
    result = run("sample", *options, "--candidates", 6, "--score", "likelihood", "--out", tmp_path / "a.png")
    assert f"12 images of {model} in" in result.output and "kept 4 of 12 candidates (33.3%)" in result.output
    assert "rows are classes, columns the best of seeds 3-8" in result.output
    sampler = var_ext.load(model)
    best = sampler.best_of([4] * 6 + [1] * 6, [*range(3, 9)] * 2, Likelihood(sampler), 2)
    assert best.labels.tolist() == [4, 4, 1, 1]
    pixels = (best.images[3].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    cell = pixels.repeat(8, 0).repeat(8, 1)  # 8 px images are shown at 64 px
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png"))[-68:-4, -68:-4], cell)


def test_a_classifier_of_a_file(tmp_path: Path) -> None:
    """A model of 1000 classes, as the classifier has them."""
    vae, _ = tiny()
    torch.manual_seed(0)
    var = var_ext.models.VAR(vae, num_classes=1000, depth=1, embed_dim=64, num_heads=1, patch_nums=(1, 2, 4))
    model = save_model(tmp_path / "model", vae, var)
    torch.save(random_network().state_dict(), tmp_path / "lite0.pth")
    score, out = f"classifier:{tmp_path / 'lite0.pth'}", tmp_path / "a.npz"
    options = ("--model", model, "--labels", "7,417", "--count", 1, "--quiet")
    assert (
        "kept 2 of 4 candidates (50%): mean classifier"
        in run("sample", *options, "--candidates", 2, "--score", score, "--out", out).output
    )
    torch.save({**random_network().state_dict(), "_fc.bias": torch.ones(1000)}, tmp_path / "lite0.pth")
    output = run("sample", *options, "--candidates", 2, "--score", score, "--out", out, code=1).output
    assert "selection.score.digest: '" in output


def test_the_curve_of_the_bundled_model(tmp_path: Path) -> None:
    args = ("--keep", "1,0.5", "--score", "judge", "--images-per-class", 2, "--quiet")
    output = run("eval", "digits", *args, "--json", tmp_path / "curve.json").output
    assert "The best 2 of each class by judge" in output and "| 0.5 | 4 |" in output
    found = json.loads((tmp_path / "curve.json").read_text())
    assert [row["candidates"] for row in found["rows"]] == [2, 4] and found["rows"][1]["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--keep", "0"], 2, "'--keep'"),
        (["--keep", "1.5"], 2, "'--keep'"),
        (["--keep", "20"], 2, "'--keep'"),
        (["--keep", "nan", "--score", "likelihood"], 1, "keep must be a share (a float in (0, 1])"),
        (["--keep", "0.5"], 2, "--keep and --candidates need --score: classifier:FILE, likelihood or judge"),
        (["--candidates", "4"], 2, "--keep and --candidates need --score"),
        (
            ["--score", "likelihood"],
            2,
            "--score chooses among candidates: add --keep SHARE or --candidates N",
        ),
        (
            ["--keep", "0.5", "--candidates", "9", "--score", "likelihood"],
            2,
            "either --keep or --candidates, got both",
        ),
        (["--candidates", "1", "--score", "likelihood"], 2, "must be at least the --count of 2, got 1"),
        (["--keep", "0.5", "--score", "judge"], 1, "must have 10 classes to draw digits, got 5"),
        (
            ["--keep", "0.5", "--score", "clip"],
            1,
            "score must be classifier:FILE, likelihood or judge, got 'clip'",
        ),
        (["--keep", "0.5", "--score", "classifier"], 1, "must name its file, classifier:FILE"),
        (
            ["--keep", "0.5", "--score", "classifier:no.whl"],
            1,
            "tells 1000 classes, ImageNet's, and the model draws 5",
        ),
        (["--keep", "0.5", "--score", "likelihood", "--labels", "3,3"], 2, "--labels must differ"),
        (
            ["--keep", "0.5", "--score", "likelihood", "--more-smooth"],
            1,
            "got more_smooth, which mixes codes",
        ),
    ],
)
@pytest.mark.parametrize("out", ["a.npz", "a.png"])
def test_bad_input(model: str, tmp_path: Path, out: str, args: list[str], code: int, message: str) -> None:
    words: list[Any] = ["sample", "--model", model, "--count", 2, "--out", tmp_path / out, *args]
    assert message in " ".join(run(*words, code=code).output.split())
    assert not os.listdir(tmp_path)  # no record either, which the next run would have to match


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--keep", "0.5"], 2, "--keep and --score go together, got only --keep"),
        (["--score", "judge"], 2, "got only --score"),
        (["--keep", "a", "--score", "judge"], 2, "must be shares such as 1,0.5,0.05, got 'a'"),
        (["--keep", "0.5,0", "--score", "judge"], 1, "keep must be a share"),
        (["--keep", "0.5", "--score", "clip"], 1, "score must be classifier:FILE, likelihood or judge"),
    ],
)
def test_bad_input_to_eval_digits(args: list[str], code: int, message: str) -> None:
    assert message in run("eval", "digits", "--quiet", *args, code=code).output
