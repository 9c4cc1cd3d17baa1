"""python/train_avatars.py from one end to the other, at toy size, on pictures that need no node."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import var_ext
from tests.evaluation.test_fid import linear
from tests.programs import program_at
from var_ext.evaluation import guidance_grid
from var_ext.training import interrupts
from var_ext.training.interrupts import Interrupts

SIDE = 16


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    """With drawn pictures and a feature space that need nothing from elsewhere."""
    with program_at("train_avatars.py") as module, pytest.MonkeyPatch.context() as patch:

        def render(command: list[str], **_: Any) -> Any:
            out, counts = Path(command[3]), dict(zip(("train", "val"), (command[7], command[9]), strict=True))
            generator = np.random.default_rng(0)
            for split, count in counts.items():
                for label in "abc":
                    (out / split / label).mkdir(parents=True)
                    for i in range(int(count)):
                        pixels = generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
                        Image.fromarray(pixels).save(out / split / label / f"{i}.png")
            return type("Done", (), {"returncode": 0})

        patch.setattr(module.subprocess, "run", render)
        patch.setattr(module.features, "lite0", lambda path: linear(SIDE))
        drawn = module.drawn = []  # cells of the grid
        whole = guidance_grid.evaluate_fid

        def counted(*arguments: Any, **options: Any) -> Any:
            drawn.append(arguments[0].key)
            return whole(*arguments, **options)

        patch.setattr(guidance_grid, "evaluate_fid", counted)
        patch.setattr(module, "TOY", module.Size(12, 6, (0.0, 1.5), (0.96,), 4, 2, 3))
        yield module


def call(program: ModuleType, folder: Path, *more: str) -> Any:
    (folder / "lite0").touch()
    words = [
        "--smoke",
        "--lite0",
        folder / "lite0",
        "--out",
        folder / "out",
        "--docs",
        folder / "docs",
        "--work",
        folder / "work",
        *more,
    ]
    return CliRunner().invoke(program.main, [str(word) for word in words])


@pytest.fixture(scope="module")
def made(program: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("avatars")
    result = call(program, folder)
    assert result.exit_code == 0 and "wrote " in result.output, result.output
    return folder


def test_writes_a_model_that_loads_with_its_settings(made: Path) -> None:
    sampler = var_ext.load(made / "out")
    assert sampler.image_size == SIDE and sampler.class_names == ["a", "b", "c"]
    found = json.loads((made / "work" / "quality.json").read_text())
    assert sampler.defaults == found["sampling"] and set(found["figures"]) == {
        "samples",
        "reconstructions",
        "real",
    }
    assert all(each["report"]["facts"]["count"] == 9 for each in found["figures"].values())
    cells = json.loads((made / "work" / "page" / "guidance.json").read_text())["result"]["cells"]
    assert min(cells, key=lambda cell: cell["figures"]["FID"])["cfg"] == found["sampling"]["cfg"]
    assert "## Classes" in (made / "docs" / "report.md").read_text()
    assert [row["keep"] for row in found["best"]] == [1.0, 0.5, 0.25]


def test_writes_a_card_and_keeps_the_logs(made: Path) -> None:
    card = (made / "out" / "README.md").read_text()
    found = json.loads((made / "work" / "quality.json").read_text())
    ratio = found["figures"]["samples"]["fd"] / found["figures"]["real"]["fd"]
    assert card.startswith("# avatars") and f"**{ratio:.2f}**" in card
    assert {"samples.png", "failures.png", "NOTICE"} < {path.name for path in (made / "out").iterdir()}
    for part in ("tokenizer", "transformer", "decoder"):
        lines = (made / "docs" / f"{part}.csv").read_text().splitlines()
        assert lines[0].startswith("step,phase,seconds,loss") and ",val," in lines[-1]
    assert (made / "docs" / "curves.png").is_file() and not list((made / "docs").rglob("*.json"))


def test_the_page_takes_the_cells_of_the_choice(program: ModuleType, made: Path) -> None:
    assert len(program.drawn) == len(set(program.drawn)) == 2  # each of the two was drawn once


def test_a_later_tokenizer_or_another_recipe_is_not_passed_over(
    program: ModuleType, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True, copy_function=shutil.copy2)
    result = call(program, tmp_path, "--decoder", "weight_perceptual=0.25")
    assert result.exit_code == 1 and "weight_perceptual" in result.output
    (tmp_path / "work" / "tokenizer" / "config.json").touch()
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "train_var", lambda *_: seen.append("transformer"))
        patch.setattr(program, "train_tokenizer", lambda *_, **__: seen.append("decoder"))
        assert call(program, tmp_path).exit_code == 0 and seen == ["transformer", "decoder"]


def test_codes_are_the_tokenizers_and_the_decoder_is_not(made: Path) -> None:
    first = var_ext.load(made / "work" / "transformer").vae.half().float()
    last = var_ext.load(made / "out", precision="fp32").vae.float()
    same = {name for name, value in first.state_dict().items() if value.equal(last.state_dict()[name])}
    assert {
        name for name in first.state_dict() if name.startswith(("encoder", "quant")) and "hit" not in name
    } <= same
    assert any(name.startswith("decoder") for name in set(first.state_dict()) - same)


def test_the_same_again_trains_nothing(
    program: ModuleType, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train_tokenizer", "train_var"):
        monkeypatch.setattr(program, name, None)
    monkeypatch.setattr(program.subprocess, "run", None)
    before = {path.name: path.read_bytes() for path in (made / "out").iterdir()}
    assert call(program, made).exit_code == 0
    assert {path.name: path.read_bytes() for path in (made / "out").iterdir()} == before


def test_a_stage_ends_and_goes_on(program: ModuleType, tmp_path: Path, made: Path) -> None:
    """Stopped by the clock as soon as it may be, again and again, it ends with the same weights."""
    codes = []
    for i in range(20):  # ever later: a busy machine gets to the end as well
        result = call(program, tmp_path, "--minutes", f"{0.02 * 1.2**i:.4f}")
        codes.append(result.exit_code)
        if result.exit_code == 0:
            break
        assert result.exit_code == 75 and not (tmp_path / "out").exists(), result.output
    assert codes[-1] == 0
    for name in ("vae", "var"):
        file = f"{name}.safetensors"
        assert (tmp_path / "out" / file).read_bytes() == (made / "out" / file).read_bytes()


def test_a_training_that_was_stopped_is_not_taken_for_finished(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's folder is a model from the first step on."""
    words = [
        word for part in ("tokenizer", "transformer", "decoder") for word in (f"--{part}", "batch_size=12")
    ]
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    assert call(program, tmp_path / "whole", *words).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(
            Interrupts, "asked", lambda *_: (True, True, False)
        )  # stops after every step but the last
        codes = [call(program, tmp_path / "cut", *words).exit_code for _ in range(7)]
    assert codes == [75] * 6 + [0]  # three steps of each training
    for name in ("vae", "var"):
        files = [tmp_path / folder / "out" / f"{name}.safetensors" for folder in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_clock_ends_what_is_no_training(
    program: ModuleType, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a handler of its own the signal would end the process, and these tests with it."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(program, "measure", lambda *_: time.sleep(60))
    assert call(program, made, "--minutes", "0.005").exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_clock_asks_again(program: ModuleType, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in a destructor is printed and forgotten."""

    class Deaf:
        def __del__(self) -> None:
            time.sleep(0.5)

    def measure(*_: Any) -> None:
        Deaf()
        time.sleep(60)

    monkeypatch.setattr(program, "measure", measure)
    monkeypatch.setattr(interrupts, "AGAIN", 0.7)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    assert call(program, made, "--minutes", "0.003").exit_code == 75


def test_refuses(program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, message in (
        (("--tokenizer", "epoch=3"), "options of TokenizerRecipe are"),
        (("--decoder", "weight_l1"), "NAME=VALUE, got 'weight_l1'"),
        (("--decoder", "weight_l=2"), "options of TokenizerRecipe are"),
        (("--minutes", "-1"), "-1"),
    ):
        result = call(program, tmp_path, *words)
        assert result.exit_code == 2 and message in result.output, result.output
    monkeypatch.setattr(program.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": 1}))
    result = call(program, tmp_path)
    assert result.exit_code == 1 and "could not be drawn" in result.output
    assert not (tmp_path / "work" / "data.json").exists()


def test_goes_on_from_a_trained_tokenizer(program: ModuleType, made: Path, tmp_path: Path) -> None:
    """Of this recipe: times of its files do not count, another recipe does."""
    run = tmp_path / "given"
    shutil.copytree(made / "work" / "tokenizer", run)
    (run / "recipe.json").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "train_tokenizer", lambda *_, **__: pytest.fail("it was trained anew"))
        patch.setattr(
            program, "train_var", lambda *_: (_ for _ in ()).throw(OSError("as far as the test goes"))
        )
        result = call(program, tmp_path, "--trained-tokenizer", str(run))
        assert result.exit_code == 1 and "as far as the test goes" in result.output
        work = tmp_path / "work"
        weights = [(folder / "vae.safetensors").read_bytes() for folder in (run, work / "tokenizer")]
        assert weights[0] == weights[1] and json.loads((work / "seconds.json").read_text())["tokenizer"] > 0
        shutil.rmtree(work)
        result = call(program, tmp_path, "--trained-tokenizer", str(run), "--tokenizer", "lr=0.5")
        assert result.exit_code == 1 and "no finished training of this recipe" in result.output
        assert not (work / "tokenizer").exists() or not list((work / "tokenizer").iterdir())
