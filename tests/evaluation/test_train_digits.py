"""python/train_digits.py from one end to the other, at toy size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open

import var_ext
from tests.programs import program_at


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    with program_at("train_digits.py") as module:
        yield module


@pytest.fixture(scope="module")
def made(program: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    arguments = [
        "--smoke",
        "--out",
        str(folder / "out"),
        "--work",
        str(folder / "work"),
        "--var",
        "base_lr=2e-3",
    ]
    result = CliRunner().invoke(program.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder


def test_writes_a_model_that_loads(made: Path) -> None:
    sampler = var_ext.load(made / "out")
    assert sampler.num_classes == 10 and sampler.image_size == 8
    assert sampler([3, 4], [1, 2]).shape == (2, 3, 8, 8)
    choice = json.loads((made / "work" / "report.json").read_text())["choice"]["best"]
    assert {name: choice[name] for name in ("cfg", "top_k", "top_p")} == sampler.defaults


def test_ships_half_precision(made: Path) -> None:
    for name in ("vae", "var"):
        with safe_open(made / "out" / f"{name}.safetensors", "pt") as file:
            kinds = {file.get_slice(entry).get_dtype() for entry in file.keys()}  # noqa: SIM118  no mapping
        assert "F16" in kinds and "F32" not in kinds


def test_card_has_the_facts(made: Path) -> None:
    card = (made / "out" / "README.md").read_text(encoding="utf-8")
    report = json.loads((made / "work" / "report.json").read_text())["report"]
    assert "python python/train_digits.py --var base_lr=2e-3 --smoke" in card
    assert "1197 images to train" in card and "base_lr 0.002" in card
    assert f"**{report['frechet']['ratio']:.2f}**" in card
    assert str(made) not in card  # nothing of the machine it was made on


def test_picture_stands_in_the_card(made: Path) -> None:
    picture = Image.open(made / "out" / "samples.png")
    assert picture.format == "PNG"
    assert picture.width > 8 * 64 and picture.height > 10 * 64  # 8 px images are shown at 64
    assert "](samples.png)" in (made / "out" / "README.md").read_text(encoding="utf-8")


def test_a_finished_run_keeps_its_weights(
    made: Path, program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(program, "train_tokenizer", fail)
    monkeypatch.setattr(program, "train_var", fail)
    before = {path.name: path.read_bytes() for path in (made / "out").glob("*.safetensors")}
    seconds = json.loads((made / "work" / "seconds.json").read_text())
    arguments = ["--smoke", "--out", str(made / "out"), "--work", str(made / "work"), "--var", "base_lr=2e-3"]
    CliRunner().invoke(program.main, arguments, catch_exceptions=False)
    assert {path.name: path.read_bytes() for path in (made / "out").glob("*.safetensors")} == before
    after = json.loads((made / "work" / "seconds.json").read_text())
    assert after["tokenizer"] == seconds["tokenizer"]


def test_an_interrupted_training_goes_on(made: Path, program: ModuleType, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(made / "work", work)
    (work / "var" / "config.json").unlink()  # as if killed before the end
    seconds = json.loads((work / "seconds.json").read_text())
    arguments = ["--smoke", "--out", str(tmp_path / "out"), "--work", str(work), "--var", "base_lr=2e-3"]
    CliRunner().invoke(program.main, arguments, catch_exceptions=False)
    for name in ("vae.safetensors", "var.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (made / "out" / name).read_bytes()
    assert json.loads((work / "seconds.json").read_text())["transformer"] >= seconds["transformer"]


def test_an_unmeasured_model_is_not_published(
    made: Path, program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no judge today")

    monkeypatch.setattr(program, "evaluate_digits", fail)
    arguments = [
        "--smoke",
        "--out",
        str(tmp_path / "out"),
        "--work",
        str(made / "work"),
        "--var",
        "base_lr=2e-3",
    ]
    result = CliRunner().invoke(program.main, arguments)
    assert result.exit_code == 1 and "Error: no judge today" in result.output
    assert not (tmp_path / "out").exists()


def test_another_recipe_needs_a_new_run(made: Path, program: ModuleType, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(made / "work", work)
    arguments = ["--smoke", "--out", str(tmp_path / "out"), "--work", str(work), "--tokenizer", "lr=2e-3"]
    result = CliRunner().invoke(program.main, arguments)
    assert result.exit_code == 1 and "Error: " in result.output and "lr" in result.output
    result = CliRunner().invoke(program.main, [*arguments, "--no-resume"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "lr 0.002" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("argument", "message"),
    [("epochs", "NAME=VALUE, got 'epochs'"), ("epoch=3", "options of TokenizerRecipe are")],
)
def test_refuses_unknown_options(program: ModuleType, argument: str, message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(program.main, ["--work", str(tmp_path), "--tokenizer", argument])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
