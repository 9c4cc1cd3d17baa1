"""Settings of `var-ext train var` that cannot work: each ends with a line that says what to change, before any work."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.training.ranked import environment, launch
from tests.training.test_plan_command import SMALL, train
from var_ext.cli import main

# What the command says of each, with the small digits recipe on a tokenizer of three scales and 16 codes.
TABLE = {
    # of ranks and memory
    "--dry-run --memory 0.000001": "and one image at once with everything shared out does not fit",
    "--dry-run --memory 0.002": "GB; --micro-batch",
    "--dry-run --shard optimizer": "shard = optimizer shares out over ranks, got one: add --ranks N",
    "--dry-run --ranks 13": "a step has 12 images for 13 ranks: take a larger batch_size or fewer ranks",
    "--dry-run --ranks 37 --batch-size 64": "a step has 36 images for 37 ranks",  # all there are
    "--ranks 2": "--ranks and --memory are of a --dry-run; torchrun",
    "--shard full": "shard = full shares out over ranks, got one process: start several with torchrun",
    "--shard half": "shard must be 'none' or 'optimizer' or 'full', got 'half'",
    "--micro-batch -1": "micro_batch must be at least 0, got -1",
    "--rank-timeout 0": "rank_timeout must be in (0, inf), got 0.0",
    # of arithmetic
    "--autocast fp8": "autocast must be 'fp32' or 'bf16' or 'fp16', got 'fp8'",
    "--fp8 native": "fp8 needs a GPU of compute capability 8.9 or newer, got cpu: leave out --fp8",
    "--fp8 on": "fp8 must be 'none' or 'native' or 'emulated', got 'on'",
    "--fp8 emulated --mlp-ratio 1.25": "layers whose sides are multiples of 16, got blocks.0.ffn.fc1 of (40, 32)",
    # of sizes
    "--depth 0": "depth must be at least 1, got 0",
    "--num-heads 5": "embed_dim must be a multiple of num_heads, got 32 and 5",
    "--patch-nums 4,2,1": "patch_nums must",
    "--drop-rate 1": "drop_rate must be in [0, 1), got 1.0",
    "--ema 1": "ema must be in [0, 1), got 1.0",
    # of the optimizer and the loss
    "--optimizer sgd": "optimizer must be 'adamw' or 'muon', got 'sgd'",
    "--optimizer muon --shard full": "optimizer = muon needs whole matrices, which shard = full takes apart",
    "--optimizer muon --freeze blocks.*": "muon trains matrices of attention and MLP, got none: freeze fewer",
    "--loss-weights 1,2": "loss_weights must have 3 numbers, one a scale, got 2: 1,2",
    "--dry-run --loss-weights 1,2": "loss_weights must have 3 numbers, one a scale, got 2: 1,2",
    "--loss-weights equal": "loss_weights must be 'lognormal' or numbers of at least 0, one a scale and not all 0",
    "--pg 0.5 --pg0 2": "pg0 must be below 2, the index of the last of 3 scales, for any to join; got 2",
    "--base-lr 0": "base_lr must be in (0, inf), got 0.0",
    "--base-lr nan": "base_lr must be in (0, inf), got nan",
    # of what is trained
    "--freeze block.*": "freeze: 'block.*' matches no parameter; names are like",
    "--freeze *": "freeze: * leave nothing to train",
    "--lora 4": "lora trains adapters of a trained model, got none: name it with --init-from NAME",
    "--dry-run --lora 4": "lora trains adapters of a trained model, got none: name it with --init-from NAME",
    "--lora -1": "lora must be at least 0, got -1",
    "--lora 4 --freeze head.*": "freeze does not go with lora, which trains adapters alone, by AdamW: leave out one",
    "--lora 4 --optimizer muon": "optimizer does not go with lora",
    "--lora 4 --fp8 emulated": "fp8 does not go with lora",
    "--lora-alpha 8": "lora_alpha is of adapters, of which there are none: add lora, their rank",
    "--lora-save adapter": "lora_save is of adapters, of which there are none: add lora, their rank",
    "--lora-targets head": "lora_targets is of adapters, of which there are none: add lora, their rank",
    "--lora 4 --lora-save both": "lora_save must be 'merged' or 'adapter', got 'both'",
    "--init-from nowhere": "the model must be one of",
}  # fmt: skip


@pytest.mark.parametrize("options", TABLE)
def test_bad_settings_are_refused_with_the_remedy(
    images: Path, tokenizer: Path, tmp_path: Path, options: str
) -> None:
    code, text = train(images, tokenizer, tmp_path / "out", *options.split())
    assert code != 0 and TABLE[options] in " ".join(text.split()), text
    assert "Traceback" not in text
    # at most the log that shows that the folder can be written, and the lock on it
    assert {path.name for path in (tmp_path / "out").glob("*")} in (set(), {".lock", "log.jsonl"})


# The same of a model to begin with, whose width is 32 in two blocks.
TUNING = {
    "--depth 3": "weights to begin with must be of a transformer with depth = 3, got 2",
    "--no-attn-l2-norm": "weights to begin with must be of a transformer with attn_l2_norm = False, got True",
    "--lora 32": "lora must be below 32, the smaller side of blocks.0.attn.mat_qkv, got 32: train the layer itself",
    "--lora 4 --lora-targets blocks.{2-3}.*": "lora_targets: 'blocks.{2-3}.*' matches no linear layer; names are like",
    "--lora 4 --lora-targets pos_1LC": "lora_targets: 'pos_1LC' matches no linear layer; names are like",
    "--lora 4 --lora-save adapter --patch-nums 1,3,4": "lora_save = adapter keeps the scales",
    "--dry-run --lora 32": "lora must be below 32",
}  # fmt: skip


@pytest.mark.parametrize("options", TUNING)
def test_bad_settings_of_tuning(images: Path, trained: Path, tmp_path: Path, options: str) -> None:
    words = ["train", "var", str(images), "--init-from", str(trained), "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(main, [*words, *options.split()])
    assert found.exit_code != 0 and TUNING[options] in " ".join(found.output.split()), found.output
    assert "Traceback" not in found.output


def test_a_batch_smaller_than_the_ranks(images: Path, tokenizer: Path, tmp_path: Path) -> None:
    words = [
        "train",
        "var",
        str(images),
        "--tokenizer",
        str(tokenizer),
        "--out",
        str(tmp_path / "out"),
        *SMALL,
    ]
    command = launch(2, "-m", "var_ext", *words, "--batch-size", "1")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "a step has 1 images for 2 ranks: take a larger batch_size or fewer ranks" in done.stderr, (
        done.stderr
    )


def test_norms_of_queries_and_the_average_are_options(images: Path, tokenizer: Path, tmp_path: Path) -> None:
    """--no-attn-l2-norm has no scale to learn, as published without; --ema is what the folder keeps."""
    import var_ext

    found = {}
    for name, options in {
        "plain": "", "off": "--no-attn-l2-norm", "ema": "--ema 0.9",
    }.items():  # fmt: skip
        out = tmp_path / name
        small = [
            "--epochs",
            "1",
            "--copies",
            "1",
            "--quiet",
            "--num-heads",
            "2",
            "--no-half",
            "--select",
            "last",
        ]
        code, text = train(images, tokenizer, out, *small, "--ema", "0", *options.split())
        assert code == 0, text
        found[name] = var_ext.load(out).var
    norms = {name: {n for n in var.state_dict() if "scale_mul" in n} for name, var in found.items()}
    assert len(norms["plain"]) == 2 and norms["off"] == set() and norms["ema"] == norms["plain"]
    assert not found["off"].config["attn_l2_norm"] and found["off"].blocks[0].attn.scale == 0.25 / 4
    plain, average = found["plain"].state_dict(), found["ema"].state_dict()
    assert not any(
        (plain[name] == average[name]).all() for name in ("head.weight", "blocks.1.ffn.fc1.weight")
    )
