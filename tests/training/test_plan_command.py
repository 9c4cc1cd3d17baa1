"""`var-ext train var --dry-run`, and what the trainers refuse of ranks, precision and memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from var_ext.cli import main

SMALL = ["--preset", "digits", "--depth", "2", "--embed-dim", "32", "--batch-size", "12"]


def train(images: Path, tokenizer: Path, out: Path, *options: str) -> tuple[int, str]:
    words = ["train", "var", str(images), "--tokenizer", str(tokenizer), "--out", str(out), *SMALL, *options]
    found = CliRunner().invoke(main, words)
    return found.exit_code, found.output


def test_a_dry_run_prints_the_plan_and_trains_nothing(images: Path, tokenizer: Path, tmp_path: Path) -> None:
    code, text = train(images, tokenizer, tmp_path / "out", "--dry-run", "--ranks", "3", "--shard", "full")
    assert code == 0, text
    assert "0.0M parameters; 12 images a step" in text and "a rank of 3, 4 images at once" in text
    assert [line.split()[0] for line in text.splitlines()[2:]] == [
        "weights", "gradients", "optimizer", "activations", "total",
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dry-run --memory 0.000001", "and one image at once with everything shared out does not fit"),
        ("--dry-run --memory 0.002", "GB; --micro-batch"),
        ("--dry-run --shard optimizer", "shard = optimizer shares out over ranks, got one: add --ranks N"),
        ("--ranks 2", "--ranks and --memory are of a --dry-run; torchrun"),
        ("--shard full", "shard = full shares out over ranks, got one process: start several with torchrun"),
        ("--shard half", "shard must be 'none' or 'optimizer' or 'full', got 'half'"),
        ("--micro-batch -1", "micro_batch must be at least 0, got -1"),
        ("--autocast fp8", "autocast must be 'fp32' or 'bf16' or 'fp16', got 'fp8'"),
        ("--rank-timeout 0", "rank_timeout must be in (0, inf), got 0.0"),
    ],
)
def test_bad_settings_are_refused_with_the_remedy(
    images: Path, tokenizer: Path, tmp_path: Path, options: str, message: str
) -> None:
    code, text = train(images, tokenizer, tmp_path / "out", *options.split())
    assert code != 0 and message in " ".join(text.split()), text
    assert "Traceback" not in text
