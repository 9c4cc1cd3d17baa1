"""Options of a part of a training that is off are refused where somebody asked for them, and only there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from var_ext.cli import main
from var_ext.training import Recipe, TokenizerRecipe, VARRecipe
from var_ext.training.recipe_losses import CriticFields, LossFields
from var_ext.training.recipe_parts import NOTHING, PARTS, Part, check_used

CLASSES: dict[str, type[Recipe]] = {"tokenizer": TokenizerRecipe, "var": VARRecipe}
CASES = [
    (kind, part, name)
    for kind, cls in CLASSES.items()
    for part in PARTS
    for name in part.options
    if {name, *part.off} <= {f.name for f in dataclasses.fields(cls)}
]


def another(recipe: Recipe, name: str) -> Any:
    """A value that the field does not have yet."""
    (spec,) = (f for f in dataclasses.fields(recipe) if f.name == name)
    value, allowed = getattr(recipe, name), spec.metadata["allowed"]
    if isinstance(allowed, tuple):
        return next(each for each in allowed if each != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, "x") if not value or isinstance(value[0], str) else (value[0] / 2, *value[1:])
    return (
        f"{value}x" if isinstance(value, str) else value + 1 if isinstance(value, int) else value / 2 + 0.37
    )


@pytest.mark.parametrize(("kind", "part", "name"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_an_option_of_a_part_that_is_off_is_refused(kind: str, part: Part, name: str) -> None:
    recipe = CLASSES[kind]()
    off = dataclasses.replace(recipe, **part.off)
    options = {name: another(recipe, name)}
    with pytest.raises(ValueError, match=rf"{name} is of .*(add|got) .*, or leave out {name}"):
        off.with_options(**options)
    with pytest.raises(ValueError, match=f"{name} is of"):
        recipe.with_options(**part.off, **options)  # in one go


@pytest.mark.parametrize(("kind", "part", "name"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_command_refuses_even_the_value_of_the_preset(
    kind: str, part: Part, name: str, tmp_path: Path
) -> None:
    recipe = CLASSES[kind]()
    value = getattr(recipe, name)
    if name in NOTHING and value == NOTHING[name]:
        value = another(recipe, name)
    words = ["train", kind, "nowhere", "--out", str(tmp_path / "out"), "--preset", "digits"]
    words += ["--tokenizer", "nowhere"] if kind == "var" else []
    for key, given in {**part.off, name: value}.items():
        flag = key.replace("_", "-")
        text = ",".join(map(str, given)) if isinstance(given, tuple) else str(given)
        words += (
            [f"--{flag}" if given else f"--no-{flag}"] if isinstance(given, bool) else [f"--{flag}", text]
        )
    found = CliRunner().invoke(main, words)
    # a part of a part that is off too: that is said first
    said = [f"Error: {option} is of" in found.output for option in (name, *part.off)]
    assert found.exit_code == 1 and any(said), found.output


def test_targets_of_restarts_are_of_cosine_codes() -> None:
    with pytest.raises(ValueError, match=r"restart_target is of restarts of cosine codes.*add using_znorm"):
        TokenizerRecipe().with_options(restart_target=0.5)
    TokenizerRecipe().with_options(restart_target=0.5, using_znorm=True)


def test_the_table_has_all_of_losses_and_critic() -> None:
    listed = {name for part in PARTS for name in part.options}
    for cls in (LossFields, CriticFields):
        own = {f.name for f in dataclasses.fields(cls) if not f.name.startswith("weight_")}
        assert own <= listed
    known = {f.name for cls in CLASSES.values() for f in dataclasses.fields(cls)} | {"init_from"}
    assert listed | {name for part in PARTS for name in part.off} <= known


def test_a_part_can_be_taken_back() -> None:
    recipe = TokenizerRecipe.paper().with_options(
        discriminator="dino.pth", semantic="vit.pth", weight_semantic=1
    )
    nothing = {"discriminator": "patch", "semantic": "", "lpips": (), "lecam": 0}
    back = recipe.with_options(weight_adversarial=0, weight_semantic=0, weight_perceptual=0, **nothing)
    assert back.discriminator == "patch" and back.weight_adversarial == 0


SOURCE = {"vocab_size": 8, "z_channels": 4, "ch": 32, "ch_mult": [1, 1], "v_patch_nums": [1, 2], "beta": 0.5}
PRESETS = {
    "digits": TokenizerRecipe.digits(), "small": TokenizerRecipe.small(), "paper": TokenizerRecipe.paper(),
    "finetune": TokenizerRecipe.finetune(SOURCE),
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "switch",
    ["weight_perceptual", "weight_adversarial", "weight_vq", "weight_l1", "restart_every", "codebook_init"],
)
def test_a_part_of_a_preset_is_switched_off_alone(preset: str, switch: str) -> None:
    found = PRESETS[preset].with_options(**{switch: 0})
    assert getattr(found, switch) == 0
    assert found.with_options(epochs=3).epochs == 3
    on = found.with_options(weight_adversarial=0.2, adversarial_start=0.1, lecam=0.3)  # and others on
    assert on.lecam == 0.3


@pytest.mark.parametrize("name", NOTHING)
def test_what_asks_for_nothing_may_stand_anywhere(name: str) -> None:
    for kind, part, option in CASES:
        if option == name:
            recipe = dataclasses.replace(CLASSES[kind](), **part.off, **{name: NOTHING[name]})
            check_used(recipe, [name])


def test_presets_of_transformers_stay_as_they_are() -> None:
    assert VARRecipe.paper(16).with_options(tokens="cached", copies=7).copies == 7
    with pytest.raises(ValueError, match="copies is of cached tokens, got tokens = online"):
        VARRecipe.paper(16).with_options(copies=7)
    assert VARRecipe.digits().with_options(augment=0).copies == 20


@pytest.mark.parametrize(("kind", "option"), [("tokenizer", "init-gain"), ("var", "init-head")])
def test_initial_weights_of_a_trained_model(kind: str, option: str, tmp_path: Path) -> None:
    words = ["train", kind, "nowhere", "--out", str(tmp_path / "out"), "--init-from", "digits"]
    found = CliRunner().invoke(main, [*words, f"--{option}", "0.5"])
    assert found.exit_code == 1 and "is of random weights, got those of --init-from" in found.output
    found = CliRunner().invoke(
        main, [*words, "--preset", "paper", "--dry-run"]
    )  # the preset's own is no fault
    assert "random weights" not in found.output


@pytest.mark.parametrize(
    ("data", "preset"), [("digits", "digits"), ("photos", "small"), ("wds:x-{split}.tar", "small")]
)
def test_the_preset_of_data(data: str, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def fake(*arguments: Any, **_: Any) -> Path:
        taken.extend(arguments)
        return tmp_path

    monkeypatch.setattr("var_ext.training.train_tokenizer", fake)
    found = CliRunner().invoke(main, ["train", "tokenizer", data, "--out", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert taken[2] == PRESETS[preset].beginning(False)
    found = CliRunner().invoke(
        main, ["train", "tokenizer", data, "--out", str(tmp_path), "--preset", "paper"]
    )
    assert taken[5] == PRESETS["paper"].beginning(False)
    if preset == "small":
        CliRunner().invoke(main, ["train", "tokenizer", data, "--out", str(tmp_path), "--image-size", "32"])
        assert taken[8] == PRESETS["small"].sized(32).beginning(False)
    shown = CliRunner().invoke(main, ["train", "tokenizer", "--help"]).output
    assert "digits for the DATA digits, else small" in " ".join(shown.split())
