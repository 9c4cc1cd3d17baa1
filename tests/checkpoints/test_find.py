"""From a name to a model: each file is read once, whatever the model lies in, and a name that is none gets advice."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch

import var_ext
from tests.tiny import answer, tiny
from var_ext import Sampler
from var_ext.checkpoints import (
    find,
    find_model,
    load_tokenizer,
    model_folder,
    pth,
    released,
    save_model,
    tensors,
)
from var_ext.checkpoints.training_run import LAST, LOG
from var_ext.info import describe_model

VAE, VAR = "vae.safetensors", "var.safetensors"
VAE_PTH, VAR_PTH = released.TOKENIZER_FILE, "var_d16.pth"

_opened: Counter[str] | None = None


def _count_open(event: str, args: tuple[object, ...]) -> None:
    if event == "open" and _opened is not None and str(args[0]).endswith("config.json"):
        _opened["config.json"] += 1


sys.addaudithook(_count_open)  # for good: the interpreter has no way to take one off


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file of a model is read: config.json by the interpreter, weights by their libraries."""
    global _opened
    _opened = counts = Counter()

    def counted(read: Callable) -> Callable:
        def wrapper(path: Path, *args: object, **options: object) -> object:
            counts[Path(path).name] += 1
            return read(path, *args, **options)

        return wrapper

    monkeypatch.setattr(tensors, "safe_open", counted(tensors.safe_open))
    monkeypatch.setattr(pth.torch, "load", counted(torch.load))
    return counts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", *tiny())


@pytest.fixture
def fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """A hub that has `folder` as someone/tiny, and tiny models as the published ones; counts what is asked for."""
    vae, var = tiny()
    torch.save(vae.state_dict(), folder / VAE_PTH)
    torch.save(var.state_dict(), folder / VAR_PTH)
    counts: Counter[str] = Counter()

    def fetch(repository: str, file: str) -> str:
        counts[file] += 1
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(find, "published_config", lambda depth: {"vae": vae.config, "var": var.config})
    return counts


def test_each_file_of_a_folder_is_read_once(folder: Path, reads: Counter[str]) -> None:
    assert answer(var_ext.load(folder)) == answer(Sampler(*tiny()))
    assert reads == {"config.json": 1, VAE: 1, VAR: 1}
    reads.clear()
    load_tokenizer(folder)
    assert reads == {"config.json": 1, VAE: 1}
    reads.clear()
    assert "depth 2" in describe_model(folder)
    assert reads == {"config.json": 1}


def test_each_file_of_a_repository_is_fetched_and_read_once(
    fetched: Counter[str], reads: Counter[str]
) -> None:
    assert answer(var_ext.load("someone/tiny")) == answer(Sampler(*tiny()))
    assert reads == fetched == {"config.json": 1, VAE: 1, VAR: 1}
    for asked in (reads, fetched):
        asked.clear()
    assert "depth 2" in describe_model("someone/tiny")
    assert reads == fetched == {"config.json": 1}


def test_each_published_file_is_fetched_and_read_once(fetched: Counter[str], reads: Counter[str]) -> None:
    assert answer(var_ext.load("var-d16")) == answer(Sampler(*tiny()))
    assert reads == fetched == {VAE_PTH: 1, VAR_PTH: 1}
    for asked in (reads, fetched):
        asked.clear()
    load_tokenizer("var-d16")
    assert reads == fetched == {VAE_PTH: 1}
    reads.clear()
    describe_model("var-d16")
    assert not reads


@pytest.mark.parametrize("name", ["var-d17", "nothing", "", "a/b/c"])
def test_unknown_model_lists_what_exists(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"must be one of .*var-d16, .*var-d36, an existing model folder, or 'owner/name'"
    ):
        var_ext.load(name)


def test_a_path_is_no_name() -> None:
    with pytest.raises(ValueError, match=r"got the path 'var-d16', where there is none$"):
        var_ext.load(Path("var-d16"))


ALL = "var-d16, var-d20, var-d24, var-d30 or var-d36"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("FoundationVision/var", ALL),
        ("foundationvision/VAR", ALL),
        ("FoundationVision/var-d20", "var-d20"),
        ("VAR_d30", "var-d30"),
        ("var_d24.pth", "var-d24"),
        ("d36", "var-d36"),
        ("Digits", "digits"),
    ],
)
def test_a_name_that_is_nearly_one(name: str, meant: str, fetched: Counter[str]) -> None:
    with pytest.raises(ValueError, match=rf"got '{name}': did you mean {meant}"):
        var_ext.load(name)
    assert not fetched


def test_a_name_like_no_other_gets_no_guess() -> None:
    with pytest.raises(ValueError, match=r"got 'elephant'$"):
        find_model("elephant")


def test_a_file_instead_of_a_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"got a file: give its folder, {folder}"):
        var_ext.load(str(folder / VAR))
    torch.save(tiny()[1].state_dict(), tmp_path / "mine.pth")
    with pytest.raises(
        ValueError, match=r"got a file: `var-ext convert TOKENIZER .* such files as .*mine\.pth"
    ):
        var_ext.load(tmp_path / "mine.pth")


def test_published_files_in_a_folder_get_the_command(tmp_path: Path) -> None:
    for file in (VAE_PTH, VAR_PTH):
        (tmp_path / file).touch()
    with pytest.raises(
        model_folder.CheckpointError,
        match=rf"holds no config\.json but {VAE_PTH}, {VAR_PTH}: `var-ext convert",
    ):
        var_ext.load(tmp_path)


def test_a_training_run_that_is_not_done(tmp_path: Path) -> None:
    for file in (LAST, LOG, "recipe.json"):
        (tmp_path / file).touch()
    with pytest.raises(
        model_folder.CheckpointError,
        match="training run without a checkpoint yet, or of an older version: the same `var-ext train` command",
    ):
        var_ext.load(tmp_path)
