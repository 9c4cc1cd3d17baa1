"""The program that compares remedies: it trains what is missing, keeps what is done, and its table is right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.programs import program_at
from tests.threads import threads
from var_ext.training import TokenizerRecipe

SIZES = ["epochs=1", "ch_mult=1,1", "patch_nums=1,4,6", "vocab_size=32", "batch_size=4", "codebook_init=64"]
TINY = [word for each in SIZES for word in ("--set", each)]


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    with program_at("ablate_tokenizer.py") as module:
        yield module


def pictures(folder: Path) -> Path:
    for path in ("train/a", "val/a"):
        (folder / path).mkdir(parents=True)
        for i in range(12):
            noise = np.random.default_rng(i).integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(noise).save(folder / path / f"{i}.png")
    return folder


def test_two_variants_and_seeds(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(pictures(tmp_path / "data")), "--out", str(tmp_path), "--count", "10", *TINY]
    with threads(1):
        program.main([*arguments, "--variants", "plain,cosine", "--seeds", "0"])
        one = (tmp_path / "ablation.md").read_text()
        trained: list[Path] = []
        train = program.train_tokenizer
        monkeypatch.setattr(
            program, "train_tokenizer", lambda *a, **k: (trained.append(a[1]), train(*a, **k))
        )
        program.main([*arguments, "--variants", "plain", "--seeds", "0,1"])
    assert [path.name for path in trained] == ["plain-1"]  # seed 0 was there
    two = (tmp_path / "ablation.md").read_text()
    assert one != two and two in capsys.readouterr().out
    head, _, *rows = one.splitlines()[2:]
    assert head.startswith("| variant | codes 1x1 | codes 4x4 | codes 6x6 | perplexity 1x1 |")
    assert [row.split(" | ")[0] for row in rows] == ["| plain", "| cosine"]
    assert all(len(row.split("|")) == len(head.split("|")) for row in rows)
    assert "±" not in one and "±" in two
    assert head.endswith("| minutes of training |") and float(rows[0].split("|")[-2]) >= 0
    page = tmp_path / "cosine-0" / "report" / "tokenizer.md"
    assert "PSNR up to it" not in page.read_text()  # the decoder runs once an image


def test_other_settings_are_measured_again(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Lpips:
        def __init__(self, files: list[str]) -> None:
            self.files = files
            self.name = "lpips-toy"

        def digest(self) -> str:
            return self.files[0]

        def __call__(self, a: Tensor, b: Tensor) -> Tensor:
            return len(self.files[0]) + (a - b).abs().mean((1, 2, 3))

    class Lite0(torch.nn.Linear):
        def features(self, images: Tensor) -> Tensor:
            return 100 * images.mean((2, 3)) * self.weight.detach()[0]

    def lite0(path: Path) -> Lite0:
        torch.manual_seed(len(path.name))
        return Lite0(3, 1)

    monkeypatch.setattr(program, "load_lpips", Lpips)
    monkeypatch.setattr(program, "read_lite0", lite0)
    monkeypatch.setattr(program, "LPIPS", Lpips)
    measured: list[str] = []
    evaluate = program.evaluate_tokenizer
    monkeypatch.setattr(
        program, "evaluate_tokenizer", lambda *a, **k: (measured.append(words[-1]), evaluate(*a, **k))[1]
    )
    start = [str(pictures(tmp_path / "data")), "--out", str(tmp_path), "--seeds", "0", "--variants", "plain"]
    words = [*start, *TINY]
    seen = []
    for more in (["--count", "10"], ["--count", "9"], ["--lpips", "a"], ["--lpips", "bb"], ["--lite0", "a"],
                 ["--lite0", "bb"], ["--set", "epochs=2"]):  # fmt: skip
        words = [*start, "--count", "10", *TINY, *more]
        count = len(measured)
        with threads(1):
            program.main(words)
            assert len(measured) == count + 1, more
            program.main(words)  # and not again
        assert len(measured) == count + 1, more
        seen.append((tmp_path / "ablation.md").read_text())
    assert len(set(seen)) == len(seen)
    # runs of both kinds in one table: all as asked for now
    with threads(1):
        program.main([*words, "--lpips", "a", "--seeds", "0,1"])
        (tmp_path / "plain-0" / "figures.json").write_text('{"psnr": 1}')  # of an older version
        program.main([*words, "--seeds", "0,1"])
    assert "lpips-toy" not in (tmp_path / "ablation.md").read_text()
    with pytest.raises(SystemExit) as ended:
        program.main([*words, "--set", "lr=0.5"])
    assert ended.value.code == 1 and "wanted recipe.lr = 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "plain,magic"], "--variants must be of plain, .*, got magic"),
        (["--set", "epochs"], "--set must be NAME=VALUE, got epochs"),
        (["--set", "magic=1"], "options of TokenizerRecipe are .*; got magic"),
        (["--seeds", "a"], "invalid literal for int"),
    ],
)
def test_bad_arguments(
    program: ModuleType,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        program.main(["digits", "--out", str(tmp_path), *arguments])
    assert re.search(message, capsys.readouterr().err, re.S)


def test_every_variant_is_a_recipe(program: ModuleType) -> None:
    assert program.BASE.image_size == 64
    for options in program.VARIANTS.values():
        program.BASE.with_options(**options)


def test_an_option_of_some_variants_may_be_set_for_all(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes: list[TokenizerRecipe] = []

    def measured(out: Path, data: str, recipe: TokenizerRecipe, *rest: object) -> None:
        recipes.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "measured", measured)
    for variant in ("plain", "cosine+centre+restarts"):
        with pytest.raises(KeyboardInterrupt):
            program.main(
                ["nowhere", "--out", str(tmp_path), "--variants", variant, "--set", "restart_until=0.5"]
            )
    plain, restarts = recipes
    assert plain.restart_every == 0 and restarts.restart_every > 0
    assert plain.restart_until == restarts.restart_until == 0.5
