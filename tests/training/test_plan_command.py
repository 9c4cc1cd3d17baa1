"""`var-ext train var --dry-run`."""

from __future__ import annotations

from pathlib import Path

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


def test_what_muon_cannot_share_out_is_not_tried(images: Path, tokenizer: Path, tmp_path: Path) -> None:
    words = [
        "train",
        "var",
        str(images),
        "--tokenizer",
        str(tokenizer),
        "--out",
        str(tmp_path / "out"),
        "--dry-run",
    ]
    sizes = [
        "--depth",
        "2",
        "--embed-dim",
        "32",
        "--num-heads",
        "2",
        "--batch-size",
        "16",
        "--optimizer",
        "muon",
    ]
    done = CliRunner().invoke(main, [*words, *sizes, "--ranks", "4", "--memory", "0.0001"])
    assert done.exit_code == 1 and "does not fit: take more ranks" in done.output
