"""Fine-tuning of a tokenizer: what stays bit for bit, and what is refused; activation checkpointing; compilation."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from var_ext.checkpoints import CheckpointError, load_tokenizer
from var_ext.cli import main
from var_ext.data import load_dataset
from var_ext.training import TokenizerRecipe, train_tokenizer
from var_ext.training.build_tokenizer import build_tokenizer
from var_ext.training.loop import Moment
from var_ext.training.tokenizer import TokenizerTask


@pytest.fixture
def tuning(tokenizer: Path) -> TokenizerRecipe:
    return TokenizerRecipe.finetune(load_tokenizer(tokenizer).config).with_options(
        epochs=2,
        batch_size=12,
        dropout=0.1,
        lr=1e-3,
        micro_batch=5,
        weight_adversarial=0.4,
        adversarial_start=0.3,
    )


def test_the_decoder_alone_is_trained_and_codes_stay(
    tokenizer: Path, tuning: TokenizerRecipe, images: Path, tmp_path: Path
) -> None:
    before, tuning = load_tokenizer(tokenizer), tuning.with_options(epochs=8)
    out = tmp_path / "out"
    train_tokenizer(images, out, tuning, init_from=tokenizer, progress=False)
    after = load_tokenizer(out)
    own = after.state_dict()
    for name, tensor in before.state_dict().items():
        moved = name.startswith(("decoder.", "post_quant_conv.")) or name == "quantize.ema_vocab_hit_SV"
        assert torch.equal(own[name], tensor) != moved, name
    batch = load_dataset(images, "val", 8).batch(range(4))[0]
    for one, two in zip(before.img_to_idxBl(batch), after.img_to_idxBl(batch), strict=True):
        assert torch.equal(one, two)
    errors = [float((vae(batch)[0] - batch).square().mean()) for vae in (before, after)]
    assert errors[1] < errors[0]
    pins = json.loads((out / "recipe.json").read_text())
    assert pins["perceptual"] == "structural" and pins["discriminator"] == "PatchDiscriminator"
    copied = shutil.copytree(out, tmp_path / "copied")
    with pytest.raises(CheckpointError, match="weights to begin with changed"):
        train_tokenizer(images, out, tuning, init_from=copied, progress=False)


def test_training_starts_with_the_tokens_of_the_weights(
    tokenizer: Path, tuning: TokenizerRecipe, images: Path
) -> None:
    """Dropout in a frozen encoder would train the decoder on tokens that nobody makes."""
    task = TokenizerTask(images, tuning, source=load_tokenizer(tokenizer))
    task.step(Moment(0, 10, 0, True), task.train_data.batch(range(12)))
    assert not task.vae.encoder.training and task.vae.decoder.training
    trained = {name for name, p in task.vae.named_parameters() if p.requires_grad}
    assert trained == task.trained and all(
        name.startswith(("decoder.", "post_quant_conv.")) for name in trained
    )
    # the pass ahead for the adaptive weight leaves frozen parameters frozen
    task.step(Moment(9, 10, 0, True), task.train_data.batch(range(12)))
    assert {name for name, p in task.vae.named_parameters() if p.requires_grad} == trained


def test_other_scales_have_the_same_weights(tokenizer: Path, tuning: TokenizerRecipe) -> None:
    source = load_tokenizer(tokenizer)
    vae = build_tokenizer(dataclasses.replace(tuning, patch_nums=(1, 2, 3, 6)), source)
    assert vae.image_size == 12 and torch.equal(vae.encoder.conv_in.weight, source.encoder.conv_in.weight)
    assert vae.config["dropout"] == 0.1 and vae.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ch": 64, "vocab_size": 8}, r"with vocab_size = 8, got 16; ch = 64, got 32"),
        (
            {"codebook_init": 5, "restart_every": 3},
            "got codebook_init = 5 and restart_every = 3: --codebook-init 0",
        ),
        (
            {"freeze": "encoder,decoder", "weight_adversarial": 0.4},
            "weight_adversarial must be 0 where decoder.conv_out",
        ),
        ({"anchors": True}, "got anchors = True: .* --no-anchors"),
        ({"centre": 0.1}, "where quant_conv is frozen, got centre = 0.1: --centre 0"),
        ({"gradient": "rotation"}, "gradient = rotation is of the encoder, which is frozen"),
        (
            {"restart_every": 3, "centre": 0.1, "weight_entropy": 0.1},
            "got restart_every = 3: .*; .* got centre = 0.1: --centre 0; weight_entropy = 0.1 is of encoder and codes",
        ),
        (
            {"gradient": "rotation", "freeze": "encoder.*,quant_conv.*"},
            "gradient = rotation is of the encoder, which is frozen",
        ),
        ({"weight_entropy": 0.1}, "weight_entropy = 0.1 is of encoder and codes, which are frozen"),
        ({"freeze": "encoders"}, "freeze: 'encoders' matches no parameter"),
        ({"freeze": "encoder,quantizer,decoder"}, "leave nothing to train"),
    ],
)
def test_what_cannot_be_is_refused(
    tokenizer: Path, tuning: TokenizerRecipe, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_tokenizer(tuning.with_options(**options), load_tokenizer(tokenizer))


@pytest.mark.parametrize(("asked", "kept"), [({}, True), ({"codebook_init": 20}, False)])
def test_codes_of_the_source_stay_unless_others_are_asked_for(
    tokenizer: Path, tokenizer_recipe: TokenizerRecipe, images: Path, asked: dict[str, int], kept: bool
) -> None:
    source, recipe = load_tokenizer(tokenizer), tokenizer_recipe.with_options(**asked)
    task = TokenizerTask(images, recipe, source=source)
    task.start()
    assert torch.equal(task.vae.quantize.embedding.weight, source.quantize.embedding.weight) == kept
    assert task.pins["recipe"]["codebook_init"] == asked.get("codebook_init", 0)
    new = TokenizerTask(images, tokenizer_recipe)
    first = new.vae.quantize.embedding.weight.clone()
    new.start()
    assert not torch.equal(new.vae.quantize.embedding.weight, first)
    assert new.pins["recipe"]["codebook_init"] == 512  # as in checkpoints from before


@pytest.mark.parametrize(
    ("freeze", "options"),
    [
        ("encoder", {"weight_entropy": 0.1}),  # codes learn from it
        ("quantizer", {"weight_entropy": 0.1, "gradient": "rotation"}),
        ("quant_conv.*,quantizer", {"weight_entropy": 0.1, "gradient": "rotation"}),
        ("encoder.conv_in.*", {"gradient": "rotation"}),
    ],
)
def test_what_something_learns_from_is_not_refused(
    tokenizer: Path, tuning: TokenizerRecipe, freeze: str, options: dict[str, object]
) -> None:
    build_tokenizer(tuning.with_options(freeze=freeze, **options), load_tokenizer(tokenizer))


@pytest.mark.parametrize("words", [[], ["--freeze", "encoder,quantizer"]])
def test_a_preset_from_a_source_keeps_its_codes(
    tokenizer: Path, images: Path, tmp_path: Path, words: list[str]
) -> None:
    sizes = "--vocab-size 16 --z-channels 4 --ch 32 --ch-mult 1,1 --patch-nums 1,2,4 --share-quant-resi 2"
    words = [
        *sizes.split(),
        "--preset",
        "digits",
        "--restart-every",
        "0",
        "--init-from",
        str(tokenizer),
        *words,
    ]
    command = ["train", "tokenizer", str(images), "--out", str(tmp_path), "--epochs", "1", *words, "--quiet"]
    dry = CliRunner().invoke(main, [*command, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    done = CliRunner().invoke(main, [*command, "--lr", "1e-9", "--ema", "0", "--no-half"])
    assert done.exit_code == 0, done.output
    codes = [load_tokenizer(folder).quantize.embedding.weight for folder in (tmp_path, tokenizer)]
    torch.testing.assert_close(*codes, rtol=0, atol=1e-6)  # a few steps of the learning rate


def test_initial_weights_have_the_gain(tokenizer_recipe: TokenizerRecipe) -> None:
    torch.manual_seed(0)
    conv = (
        build_tokenizer(dataclasses.replace(tokenizer_recipe, ch=128, init_gain=0.5))
        .encoder.down[0]
        .block[0]
        .conv1
    )
    wanted = 0.5 * (2 / (2 * 128 * 9)) ** 0.5
    assert float(conv.weight.detach().std()) == pytest.approx(wanted, rel=0.02)  # of 147456 draws
    assert conv.bias.abs().max() == 0


@pytest.mark.parametrize(
    "options", [{"activation_checkpointing": True}, pytest.param({"compile": True}, marks=pytest.mark.slow)]
)
def test_what_saves_memory_or_time_changes_nothing(
    options: dict[str, object], images: Path, tokenizer_recipe: TokenizerRecipe
) -> None:
    recipe = dataclasses.replace(
        tokenizer_recipe, dropout=0.2, weight_perceptual=1.0, perceptual="structural", weight_adversarial=0.4,
        adversarial_start=0.0, adversarial_warmup=0.0, restart_every=0,
    )  # fmt: skip
    tasks = [TokenizerTask(images, each) for each in (recipe, recipe.with_options(**options))]
    for task in tasks:
        task.step(Moment(3, 10, 0, True), task.train_data.batch(range(12)))
    for one, two in zip(*(task.vae.parameters() for task in tasks), strict=True):
        if one.grad is None:
            assert two.grad is None
        elif "compile" in options:  # other kernels, whose sums have another order
            torch.testing.assert_close(
                two.grad, one.grad, rtol=1e-3, atol=1e-4 * float(one.grad.abs().max()) + 1e-7
            )
        else:
            assert torch.equal(one.grad, two.grad)  # type: ignore[arg-type]


def test_the_command_fine_tunes(tokenizer: Path, images: Path, tmp_path: Path) -> None:
    words = ["train", "tokenizer", str(images), "--out", str(tmp_path / "out"), "--init-from", str(tokenizer)]
    found = CliRunner().invoke(main, [*words, "--epochs", "1", "--quiet", "--lpips", "nowhere.pth"])
    assert found.exit_code == 1 and "could not read" in found.output and "nowhere.pth" in found.output
    found = CliRunner().invoke(main, [*words, "--epochs", "1", "--quiet"])
    assert found.exit_code == 0, found.output
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())["recipe"]
    assert (
        recipe["freeze"] == ["encoder", "quantizer"]
        and recipe["ch"] == 32
        and recipe["perceptual"] == "structural"
    )
