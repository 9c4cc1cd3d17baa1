"""A run does not write over the model that it begins with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from var_ext.checkpoints import load_tokenizer
from var_ext.cli import main
from var_ext.training import TokenizerRecipe, VARRecipe, train_tokenizer, train_var


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    """A folder with the files of a model alone, which no checkpoint guards."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in ("config.json", "vae.safetensors", "var.safetensors"):
        (folder / file).write_bytes((trained / file).read_bytes())
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def linked(folder: Path) -> Path:
    link = folder.parent / "link"
    link.symlink_to(folder, target_is_directory=True)
    return link


def adapter(folder: Path) -> Path:
    other = folder.parent / "adapter"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    return other


NAMES: dict[str, Callable[[Path], Path]] = {
    "same": lambda folder: folder,
    "other words": lambda folder: folder / ".." / folder.name,
    "link": linked,
    "adapters of it": adapter,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", ["tokenizer", "init_from", "tokenizer's init_from"])
def test_the_folder_of_the_source_is_refused(
    model: Path, images: Path, tokenizer: Path, name: str, option: str, tokenizer_recipe: TokenizerRecipe
) -> None:
    source, before = NAMES[name](model), content(model)
    wanted = f"folder than that of {option.split()[-1]}, whose weights it would replace, got .*: name a new one with"
    with pytest.raises(ValueError, match=wanted):
        if option == "tokenizer":
            train_var(images, source, model, VARRecipe(epochs=1), progress=False)
        elif option == "init_from":
            train_var(images, tokenizer, model, VARRecipe(epochs=1), init_from=source, progress=False)
        else:
            train_tokenizer(images, model, tokenizer_recipe, init_from=source, progress=False)
    assert content(model) == before


def test_the_bundled_model_is_refused(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("var_ext.checkpoints.find.bundled_models", lambda: {"digits": tmp_path})
    recipe = TokenizerRecipe(epochs=1, weight_perceptual=0.0)
    with pytest.raises(ValueError, match="folder than that of init_from"):
        train_tokenizer(images, tmp_path, recipe, init_from="digits", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", [["tokenizer", "--init-from"], ["var", "--tokenizer"], ["var", "--init-from"]], ids=" ".join
)
@pytest.mark.parametrize("resume", ["--resume", "--no-resume"])
def test_the_command_refuses_it(model: Path, images: Path, words: list[str], resume: str) -> None:
    before, (kind, option) = content(model), words
    arguments = ["train", kind, str(images), option, str(model), "--out", str(model), resume, "--quiet"]
    arguments += ["--epochs", "1", "--preset", "digits"] if option == "--tokenizer" else ["--epochs", "1"]
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == 1 and "name a new one with --out" in found.output, found.output
    assert content(model) == before


def test_a_run_from_another_folder_goes_on(model: Path, images: Path, tmp_path: Path) -> None:
    recipe = TokenizerRecipe.finetune(load_tokenizer(model).config).with_options(epochs=1, batch_size=12)
    out, options = tmp_path / "out", dict[str, Any](init_from=model, progress=False)
    for epochs in (1, 2, 2):
        train_tokenizer(images, out, recipe.with_options(epochs=epochs), **options)
    assert (out / "vae.safetensors").exists()
