"""`var-ext report`: the page it writes, and one line for every bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.evaluation.test_fid import linear, save
from tests.evaluation.test_fid import pictures as noise
from tests.evaluation.test_model_report import SCALES, SIDE
from tests.tiny import tiny
from var_ext.checkpoints import save_model
from var_ext.cli import main

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "tiny", *tiny(patch_nums=SCALES))
    save_model(folder / "small", *tiny())  # 8 px
    save_model(folder / "tokenizer", tiny(patch_nums=SCALES)[0])
    save(folder / "other.npz", noise(6, 1, 8))
    save(folder / "real.npz", noise(6, 1, SIDE))
    (folder / "lite0.pth").write_bytes(b"no weights")
    return folder


def call(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["report", *map(str, words), "--quiet", "--threads", "1"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join(done.output.split())


SMALL = ("--count", 1, "--speed-batches", 1, "--repeats", 1, "--precision", "fp32")


def test_the_command(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        "var_ext.evaluation.features.inception", lambda path, **options: asked.append(path) or linear(SIDE)
    )
    grid = (
        "--reference",
        models / "real.npz",
        "--grid-cfg",
        "0,1.5",
        "--grid-top-p",
        "0",
        "--grid-labels",
        "0,4",
        "--per-class",
        2,
    )
    words = (models / "tiny", "--out", tmp_path / "page", *SMALL, *grid, "--cfg", 2, "--labels", "1,3")
    code, said = call(*words)
    assert code == 0 and said == f"page: {tmp_path / 'page' / 'report.md'}", said
    text = (tmp_path / "page" / "report.md").read_text()
    assert asked == [None] and text.startswith("# The model tiny\n")
    assert "| transformer | " in text and "| torch | " in text and "| date | 20" in text
    assert "columns seeds; cfg 2.0, top_k 900, top_p 0.96, fp32." in text
    assert "| 0 | 0 (all) |" in text and "| 1.5 | 0 (all) |" in text and "top_k 900" in text
    assert "4 of tiny, 16 x 16, order: classes take turns; 2 classes, 2 images each" in text
    assert "Left out: give `--data DATA`, images to give back." in text
    assert "Left out: give `--data DATA`, the images that the model learned from." in text


def test_without_anything_the_page_says_what_to_give(models: Path, tmp_path: Path) -> None:
    code, _ = call(models / "small", "--out", tmp_path, *SMALL)
    text = (tmp_path / "report.md").read_text()
    assert code == 0 and text.count("Left out: give `--") == 4
    assert "Left out: give `--reference REF`, as `var-ext eval fid` takes it: ADM's .npz, or a folder" in text


REFUSED: dict[str, tuple[Callable[[Path], tuple[object, ...]], str]] = {
    "tokenizer": (lambda m: (m / "tokenizer",), "must hold a tokenizer and a transformer to draw images"),
    "no model": (lambda m: ("digit",), "did you mean digits?"),
    "reference of another size": (
        lambda m: (m / "tiny", "--reference", m / "other.npz"),
        "the reference must have images of the model's 16 x 16, got 8 x 8 in other.npz: take one of this size, or of "
        "a folder --image-size 16",
    ),
    "data too small": (
        lambda m: (m / "small", "--data", "digits"),
        "with data, images must have at least 11 px, for SSIM, and this model's have 8: leave the data out",
    ),
    "no data": (lambda m: (m / "tiny", "--data", m / "nowhere"), "nowhere, which does not exist"),
    "unknown features": (
        lambda m: (m / "tiny", "--data", "digits", "--features", "dino"),
        "must be some of inception, lite0, vit, clip, each once, got 'dino'",
    ),
    "features without weights": (
        lambda m: (m / "tiny", "--data", "digits", "--features", "lite0"),
        "--features lite0 needs its weights: name a file with --lite0",
    ),
    "weights of nothing": (
        lambda m: (m / "tiny", "--data", "digits", "--features", "lite0", "--lite0", m / "lite0.pth"),
        "lite0.pth",
    ),
    "features of nothing": (
        lambda m: (m / "tiny", "--features", "lite0", "--lite0", m / "lite0.pth"),
        "--features, --lite0 are of --reference or --data, got neither",
    ),
    "a probe without a space": (
        lambda m: (m / "tiny", "--data", "digits", "--class-images", 3),
        "--class-images is of a probe in a feature space: give its weights, such as --lite0",
    ),
    "grid of nothing": (
        lambda m: (m / "tiny", "--data", "digits", "--per-class", 3, "--grid-cfg", "1"),
        "--grid-cfg, --per-class are of the guidance grid: give it --reference, or --data and the weights",
    ),
    "search of nothing": (lambda m: (m / "tiny", "--search", 3), "--search are of images: name them with --data"),
    "size of nothing": (lambda m: (m / "tiny", "--image-size", 16), "--image-size is of pictures of --reference"),
    "top-p": (lambda m: (m / "tiny", "--grid-top-p", "0.9,2"), "must be finite numbers in [0, 1], got 0.9,2"),
    "cfg": (lambda m: (m / "tiny", "--grid-cfg", "a"), "must be numbers such as 0,1.5,3, got 'a'"),
    "batches": (lambda m: (m / "tiny", "--speed-batches", "0,4"), "must be at least 1, got 0,4"),
    "label of the grid": (
        lambda m: (m / "tiny", "--reference", m / "real.npz", "--grid-labels", "2,6"),
        "labels must be in 0..5 (5: no class), got [6, 6",
    ),
    "a value a scale": (lambda m: (m / "tiny", "--cfg", "1,2,3"), "cfg must be"),
    "label": (lambda m: (m / "tiny", "--labels", "9"), "labels must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr("var_ext.evaluation.features.inception", lambda path, **options: linear(SIDE))
    make, message = REFUSED[case]
    code, said = call(*make(models), "--out", tmp_path / "page")
    assert code and "Error: " in said and message in said, said
    assert not (tmp_path / "page" / "report.md").exists() and not list(tmp_path.rglob("*.tmp"))
