"""Recipes: presets, options from text, and what a checkpoint has to share."""

import dataclasses

import pytest

from var_ext.training import Recipe, TokenizerRecipe, VARRecipe


@pytest.mark.parametrize(
    "recipe",
    [TokenizerRecipe.digits(), TokenizerRecipe.small(), TokenizerRecipe.paper(), VARRecipe.digits()],
)
def test_every_field_has_a_help_text_and_survives_a_trip_through_text(recipe: Recipe) -> None:
    text = {}
    for field in dataclasses.fields(recipe):
        assert field.metadata["help"]
        value = getattr(recipe, field.name)
        text[field.name] = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    assert type(recipe)().with_options(**text) == recipe


def test_image_sizes() -> None:
    assert TokenizerRecipe.digits().image_size == 32 and TokenizerRecipe.paper().image_size == 256


@pytest.mark.parametrize(
    ("depth", "shared", "decay_end"), [(16, False, 0.05), (30, False, 0.08), (36, True, 0.08)]
)
def test_published_sizes(depth: int, shared: bool, decay_end: float) -> None:
    recipe = VARRecipe.paper(depth)
    assert (recipe.embed_dim, recipe.num_heads, recipe.shared_aln) == (64 * depth, depth, shared)
    assert recipe.weight_decay_end == decay_end and recipe.drop_path_rate == pytest.approx(0.1 * depth / 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 3}, "options of VARRecipe are seed, .*; got epoch"),
        ({"depth": "deep"}, "depth must be a int such as 16, got 'deep'"),
        ({"half": "maybe"}, "half must be a bool such as False, got 'maybe'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"select": "worst"}, "select must be 'last' or 'best' or 'best_last_scale', got 'worst'"),
        ({"autocast": "fp8"}, "autocast must be 'fp32' or 'bf16' or 'fp16', got 'fp8'"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"copies": 0}, "copies must be at least 1, got 0"),
        ({"seed": -1}, r"seed must be in \[0, 2e9\], got -1"),
        ({"base_lr": "nan"}, r"base_lr must be in \(0, inf\), got nan"),
        ({"base_lr": 0}, r"base_lr must be in \(0, inf\), got 0.0"),
        ({"clip": "inf"}, r"clip must be in \(0, inf\), got inf"),
        ({"warmup": 2.0}, r"warmup must be in \[0, 1\], got 2.0"),
        ({"drop_path_rate": 1}, r"drop_path_rate must be in \[0, 1\), got 1.0"),
        ({"workers": -2}, "workers must be at least 0, got -2"),
        ({"init_head": "-inf"}, r"init_head must be in \(-inf, inf\), got -inf"),
    ],
)
def test_bad_options_say_what_was_wanted_and_what_came(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VARRecipe().with_options(**options)


def test_every_number_has_a_range() -> None:
    for cls in (TokenizerRecipe, VARRecipe):
        for field in dataclasses.fields(cls):
            unlimited = field.type in (bool, tuple[str, ...]) or field.name in (
                "semantic",
                "discriminator",
            )  # files
            assert (field.metadata["allowed"] is None) == unlimited, field.name


def test_bad_numbers_in_a_list() -> None:
    with pytest.raises(ValueError, match="patch_nums must be at least 1, got 0"):
        TokenizerRecipe().with_options(patch_nums="1,0,3")
    with pytest.raises(ValueError, match="restart_every must be at least 0, got -1"):
        TokenizerRecipe().with_options(restart_every=-1)
    with pytest.raises(ValueError, match=r"patch_nums must be a tuple such as .*, got '1,2,x'"):
        TokenizerRecipe().with_options(patch_nums="1,2,x")


@pytest.mark.parametrize(
    ("depth", "known"), [(1, 16), (4, 16), (17, 16), (23, 20), (29, 24), (35, 30), (40, 36)]
)
def test_an_unpublished_depth_has_its_sizes_and_the_policy_of_one_below(depth: int, known: int) -> None:
    ours, theirs = VARRecipe.paper(depth), VARRecipe.paper(known)
    assert (ours.depth, ours.embed_dim, ours.num_heads) == (depth, 64 * depth, depth)
    assert ours.drop_path_rate == pytest.approx(0.1 * depth / 24)
    sizes = {name: getattr(theirs, name) for name in ("depth", "embed_dim", "num_heads", "drop_path_rate")}
    assert ours.with_options(**sizes) == theirs


def test_no_depth_at_all() -> None:
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        VARRecipe.paper(0)


def test_free_fields_are_not_pinned() -> None:
    pinned = VARRecipe.digits().pinned()
    assert "checkpoint_every" not in pinned and "cfg" not in pinned and "workers" not in pinned
    assert pinned["depth"] == VARRecipe.digits().depth and pinned["seed"] == 0


@pytest.mark.parametrize(("width", "rate"), [(1920, 1e-4), (1024, 1e-4), (128, 4e-3)])
def test_fine_tuning_takes_sizes_and_a_rate_from_the_model(width: int, rate: float) -> None:
    source = {**VAR_ARGUMENTS, "embed_dim": width, "patch_nums": [1, 2], "norm_eps": 1e-6}
    recipe = VARRecipe.finetune(source)
    assert (recipe.depth, recipe.embed_dim, recipe.num_heads, recipe.patch_nums) == (7, width, 4, ())
    assert recipe.base_lr == pytest.approx(rate, rel=0.02)
    assert VARRecipe.finetune(source, adapters=True).base_lr == pytest.approx(10 * rate, rel=0.02)


VAR_ARGUMENTS = {"depth": 7, "num_heads": 4, "mlp_ratio": 2.0, "drop_path_rate": 0.1, "shared_aln": True}


def test_a_tokenizer_has_no_last_scale_to_select_by() -> None:
    with pytest.raises(ValueError, match="select must be 'last' or 'best' for a tokenizer"):
        TokenizerRecipe(select="best_last_scale")
