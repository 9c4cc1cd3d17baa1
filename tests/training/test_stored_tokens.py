"""Tokens as a data set: the same training as from pictures, without them; nothing else is taken for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from var_ext.checkpoints import CheckpointError, load_tokenizer
from var_ext.cli import main
from var_ext.data import DataError, load_dataset
from var_ext.training import VARRecipe, store_tokens, train_var
from var_ext.training.stored_tokens import (
    NAME,
    StoredTokens,
    TokenData,
    TokenSplit,
    open_splits,
    write_token_set,
)


@pytest.fixture(scope="module")
def stored(
    images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    return store_tokens(images, tokenizer, folder, var_recipe, progress=False)


def test_a_training_ends_with_the_weights_of_one_on_the_pictures(
    trained: Path, stored: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(stored, folder)
    out = train_var(f"tokens:{folder}", tokenizer, tmp_path / "var", var_recipe, progress=False)
    found, wanted = (load_file(path / "var.safetensors") for path in (out, trained))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert json.loads((out / "config.json").read_text()) == json.loads((trained / "config.json").read_text())
    assert not list(out.glob("tokens-*"))


def test_versions_take_turns(stored: Path, images: Path, tokenizer: Path) -> None:
    vae = load_tokenizer(tokenizer)
    tokens = StoredTokens(vae, TokenData(f"tokens:{stored}", "train", vae))
    data = load_dataset(images, "train", 8, augment=1)
    rows = torch.tensor([35, 0, 7])
    for epoch in (0, 1, 4):
        ((found, labels),) = tokens.feed(epoch, [rows])
        for row, i in enumerate(rows.tolist()):
            image = data.with_epoch((i + epoch) % 2).batch([i])[0]
            assert torch.equal(found[row], torch.cat(vae.img_to_idxBl(image), 1)[0])
        assert torch.equal(labels, data.labels[rows])


def test_a_stopped_call_goes_on(
    stored: Path, images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    shutil.copytree(stored, tmp_path / "cut")
    (tmp_path / "cut" / NAME).unlink()
    shard = next((tmp_path / "cut").glob("tokens-val-*"))
    shard.unlink()
    store_tokens(images, tokenizer, tmp_path / "cut", var_recipe, progress=False)
    assert {p.name: p.read_bytes() for p in stored.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "cut").iterdir()
    }


def _edited(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        about = json.loads((folder / NAME).read_text())
        change(about)
        (folder / NAME).write_text(json.dumps(about))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / NAME).unlink(), "folder that `var-ext tokens` wrote, but: could not read"),
        (lambda folder: (folder / NAME).write_text("[]"), "but: .* must be a JSON object, got list"),
        (_edited(lambda about: about.update(format=2)), "must be of format 1, got 2"),
        (_edited(lambda about: about.update(tokenizer="0" * 64)), "by the tokenizer of the training"),
        (_edited(lambda about: about["splits"].pop("val")), "but: the split 'val'"),
        (_edited(lambda about: about["splits"]["train"].update(images=35)), "each of its 35 images, got 36"),
        (lambda folder: (folder / "labels-train.npy").unlink(), "but: .*labels-train.npy"),
        *(
            (
                _edited(lambda about, name=name, value=value: about.update({name: value})),
                "tokens: and a folder",
            )
            for name, value in (("class_names", None), ("class_names", [3]), ("splits", 3), ("splits", []))
        ),
        *(
            (
                _edited(lambda about, name=name, value=value: about["splits"]["train"].update({name: value})),
                "tokens: and a folder",
            )
            for name in ("shards", "copies", "images", "made")
            for value in (None, "x", 0.5)
        ),
    ],
)
def test_what_is_no_set_of_tokens_is_refused(
    damage: Callable[[Path], object],
    message: str,
    stored: Path,
    tokenizer: Path,
    var_recipe: VARRecipe,
    tmp_path: Path,
) -> None:
    shutil.copytree(stored, tmp_path / "set")
    damage(tmp_path / "set")
    with pytest.raises(DataError, match=message):
        open_splits(f"tokens:{tmp_path / 'set'}", load_tokenizer(tokenizer), var_recipe)


def test_missing_and_foreign_shards_are_refused(stored: Path, tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path / "set")
    vae = load_tokenizer(tokenizer)
    data = TokenData(f"tokens:{tmp_path / 'set'}", "val", vae)
    np.save(data.paths[0], np.zeros((3, 1, 21), np.int16))
    with pytest.raises(DataError, match="4 images in 1 versions, got 3 in 1"):
        StoredTokens(vae, data)
    data.paths[0].unlink()
    with pytest.raises(CheckpointError, match="must be a shard of tokens"):
        StoredTokens(vae, data)
    with pytest.raises(DataError, match="holds their tokens, of which only a transformer learns"):
        load_dataset(f"tokens:{stored}", "train", 8)


@pytest.mark.parametrize("what", ["tokens", "labels"])
def test_values_out_of_range_are_refused(what: str, stored: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "damaged"))
    file = next(folder.glob("tokens-train-*.npy" if what == "tokens" else "labels-train.npy"))
    np.save(file, np.load(file) + 100)
    vae = load_tokenizer(tokenizer)
    with pytest.raises(DataError, match=rf"{what} of tokens:.* must be in 0\.\.\d+, got "):
        next(iter(StoredTokens(vae, TokenData(f"tokens:{folder}", "train", vae)).feed(0, [torch.arange(4)])))


def test_shards_elsewhere_are_refused(stored: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "damaged"))
    about = json.loads((folder / NAME).read_text())
    about["splits"]["train"]["shards"] = ["../elsewhere.npy"]
    (folder / NAME).write_text(json.dumps(about))
    with pytest.raises(DataError, match=r"must name shards in its folder, got '\.\./elsewhere\.npy'"):
        TokenData(f"tokens:{folder}", "train", load_tokenizer(tokenizer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": 0.0}, "made with copies 2: give --copies 2, got 1"),
        ({"copies": 3}, "made with copies 2: give --copies 2, got 3"),
        ({"tokens": "online"}, "made with tokens cached: give --tokens cached, got online"),
        ({"geometry": "upright"}, "made with geometry published"),
    ],
)
def test_another_making_than_the_recipe_asks_for_is_refused(
    options: dict, message: str, stored: Path, tokenizer: Path, var_recipe: VARRecipe
) -> None:
    with pytest.raises(ValueError, match=message):
        open_splits(f"tokens:{stored}", load_tokenizer(tokenizer), var_recipe.with_options(**options))


def test_tokens_of_another_source_are_checked(tokenizer: Path, tmp_path: Path) -> None:
    vae = load_tokenizer(tokenizer)
    paths = [tmp_path / f"{i}.npy" for i in range(2)]
    for path, count in zip(paths, (2, 3), strict=True):
        np.save(path, np.full((count, 1, 21), 15, np.int32))
    labels = torch.tensor([0, 1, 2, 0, 1])

    def write(names: str = "abc", labels: torch.Tensor = labels) -> None:
        splits = {name: TokenSplit(paths, labels, {}) for name in ("train", "val")}
        write_token_set(tmp_path, vae, list(names), splits)

    write()
    data = TokenData(f"tokens:{tmp_path}", "train", vae)
    ((tokens, found),) = StoredTokens(vae, data).feed(0, [torch.tensor([4, 1, 2])])
    assert found.tolist() == [1, 1, 2] and (tokens == 15).all() and data.class_names == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"labels of train must be in 0\.\.1, got 0 to 2"):
        write("ab")
    with pytest.raises(DataError, match="21 tokens of 5 images and 4 labels"):
        write(labels=labels[:4])
    np.save(paths[1], np.full((3, 1, 21), 16, np.int32))
    with pytest.raises(DataError, match=r"tokens of train must be in 0\.\.15, got 15 to 16"):
        write()
    np.save(paths[1], np.zeros((3, 1, 20), np.int32))
    with pytest.raises(CheckpointError, match="of one shape"):
        write()


def test_the_command_says_how_to_train(images: Path, tokenizer: Path, tmp_path: Path) -> None:
    words = ["tokens", str(images), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "set"), "--quiet"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert (
        f"var-ext train var tokens:{tmp_path / 'set'} --tokenizer {tokenizer} --tokens cached --augment 0"
        in result.output
    )
    result = CliRunner().invoke(main, [*words, "--copies", "2"])
    assert result.exit_code == 1 and "copies is of augmented images" in result.output
    result = CliRunner().invoke(main, [*words, "--copies", "2", "--augment", "1"])
    assert "--tokens cached --augment 1.0 --copies 2\n" in result.output


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("{images}", {"tokens": "online"}, "got online and"),
        ("tokens:{images}", {}, "got cached and the data tokens:"),
    ],
)
def test_what_cannot_be_stored_is_refused(
    data: str, options: dict, message: str, images: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        store_tokens(data.format(images=images), tokenizer, tmp_path, VARRecipe(**options))
