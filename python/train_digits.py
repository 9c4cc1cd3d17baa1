"""Make the bundled digits model again: train, choose its sampling settings, measure it, write its model card.

    python python/train_digits.py                # two CPU cores, under 40 minutes
    python python/train_digits.py --smoke --out /tmp/digits --work /tmp/run   # a toy, in seconds

A killed run goes on where it was when the command is given again; finished weights of the same recipes are
taken from the work folder as they are. The sampling settings are chosen on the validation split; the test
split is looked at once, at the end, and only then is the model folder written. Settings and quality are
measured on the files that are shipped, with their weights rounded to half precision; what the card says of
losses on validation data is what the trainers logged before rounding.
"""

from __future__ import annotations

import json
import logging
import platform
import shlex
from pathlib import Path
from typing import Any

import click
import torch
from making import Clock, finished, found, listing, options, publish, size_of

import var_ext
from var_ext.checkpoints import CheckpointError, save_model
from var_ext.evaluation import Choice, DigitsReport, choose_sampling, evaluate_digits
from var_ext.grid import labelled_grid
from var_ext.training import TokenizerRecipe, VARRecipe, train_tokenizer, train_var

ROOT = Path(__file__).resolve().parent.parent
NAMES = [str(digit) for digit in range(10)]
SEEDS = 8  # columns of the picture
GRID: dict[str, Any] = {"cfgs": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0), "top_ks": (0,), "top_ps": (0.96, 0.9, 0.99)}
SMOKE_GRID: dict[str, Any] = {"cfgs": (0.0, 1.5), "top_ks": (0,), "top_ps": (0.96,)}
SMOKE_TOKENIZER = {
    "epochs": 1, "vocab_size": 32, "z_channels": 8, "ch": 32, "ch_mult": (1, 1), "patch_nums": (1, 2, 4),
}  # fmt: skip
SMOKE_VAR = {"epochs": 1, "depth": 1, "embed_dim": 64, "num_heads": 1, "copies": 1}

CARD = """\
# digits

Draws handwritten digits of {size} x {size} pixels, one class per digit: a multi-scale VQVAE and a
transformer that predicts its tokens scale by scale (VAR, arXiv 2404.02905), both trained by this project
from random weights.

- Tokenizer: {vae_size}. Transformer: {var_size}. Stored as fp16.
- Token maps: {maps} = {tokens} tokens of {codes} codes.
- Recommended sampling, as in `config.json`: {sampling}.
- Meant for demonstrations and tests. It knows nothing but these digits, at this size.

![One row a class, one column a seed](samples.png)

## Data

The 1797 scans of handwritten digits (8x8 pixels, 17 grey levels) inside scikit-learn: the test part of
the UCI data set "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998; CC BY 4.0),
enlarged bicubically. The fixed stratified split of `var_ext.data`: {num_train} images to train, 200 to
validate, {num_real} to test. The three share writers, because the data set does not say who wrote what.

## Training

```
{command}
```

Seeds {seeds} (tokenizer, transformer). {total:.0f} minutes in all with {threads} CPU thread(s)
({machine}, torch {torch}): tokenizer {tokenizer_time}, tokens and transformer {transformer_time},
choice of the sampling settings {choice_time}, measurement {measurement_time}. On another machine
the weights differ by rounding, and the figures a little.

- Tokenizer: {tokenizer_recipe}. On validation data, before rounding to fp16: {tokenizer_found}.
- Transformer: {var_recipe}. On validation data, before rounding to fp16: {var_found}.

## Measured quality

`var-ext eval digits` on the weights of this folder:

{report}
The judge of the classes is a support vector machine on 8x8 grey levels, trained on the training images.
The features of the Fréchet distance are fixed by the training images too: 48 principal components of
the pixels and the length of what they leave out, in pixel L2 (grey in [0, 1]). Its estimate grows as
sets shrink, so the ratio that counts is the one between sets of equal size.

## Choice of the sampling settings

On the validation split and with other seeds than the measurement: the smallest Fréchet distance among
settings whose class accuracy is at most 2 points below that of the real validation images
({real_accuracy:.1f}%); first the guidance, then top_k and top_p. {per_class} images a class for each:

| cfg | top_k | top_p | class accuracy | Fréchet distance |
| --- | --- | --- | --- | --- |
{trials}
"""


def write_picture(path: Path, sampler: var_ext.Sampler) -> None:
    """The picture that `var-ext sample` draws of these weights."""
    labels, seeds = range(len(NAMES)), range(SEEDS)
    images = sampler([i for i in labels for _ in seeds], [j for _ in labels for j in seeds])
    labelled_grid(images, NAMES, [str(seed) for seed in seeds]).save(path, format="PNG")


def write_card(
    model: Path,
    work: Path,
    recipes: tuple[TokenizerRecipe, VARRecipe],
    command: str,
    choice: Choice,
    report: DigitsReport,
    clock: Clock,
) -> None:
    """README.md of the model folder."""
    sampler = var_ext.load(model)
    schedule = sampler.vae.schedule
    rows = [
        f"| {t.cfg:g} | {t.top_k} | {t.top_p:g} | {100 * t.accuracy:.1f}% | {t.frechet:.2f}"
        f"{' (chosen)' if t == choice.best else ''} |"
        for t in choice.trials
    ]
    text = CARD.format(
        size=sampler.image_size,
        vae_size=size_of(sampler.vae, model / "vae.safetensors"),
        var_size=size_of(sampler.var, model / "var.safetensors"),
        maps=", ".join(f"{p}x{p}" for p in schedule.patch_nums),
        tokens=schedule.num_tokens,
        codes=sampler.vae.vocab_size,
        sampling=", ".join(f"{name} {value:g}" for name, value in choice.best.settings.items()),
        num_train=report.num_train,
        num_real=report.num_real,
        command=command,
        seeds=f"{recipes[0].seed} and {recipes[1].seed}",
        total=sum(clock.seconds.values()) / 60,
        threads=torch.get_num_threads(),
        machine=platform.machine(),
        torch=torch.__version__,
        **{f"{stage}_time": clock.minutes(stage) for stage in clock.seconds},
        tokenizer_recipe=listing(recipes[0]),
        tokenizer_found=found(work / "tokenizer" / "log.jsonl", recipes[0]),
        var_recipe=listing(recipes[1]),
        var_found=found(work / "var" / "log.jsonl", recipes[1]),
        report=report.as_markdown(),
        real_accuracy=100 * choice.real_accuracy,
        per_class=choice.images_per_class,
        trials="\n".join(rows),
    )
    (model / "README.md").write_text(text, encoding="utf-8")


@click.command(help=str(__doc__).replace("\n\n    python", "\n\n\b\n    python"))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=ROOT / "var_ext/weights/digits",
    help="Model folder.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=ROOT / "runs/digits",
    help="Checkpoints and logs.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of both trainings.")
@click.option(
    "--tokenizer",
    "for_tokenizer",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change the recipe.",
)
@click.option("--var", "for_var", multiple=True, metavar="NAME=VALUE", help="Change the recipe.")
@click.option(
    "--smoke",
    is_flag=True,
    help="Toy sizes, one epoch: checks the path, not the quality.",
)
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on or start anew.")
def main(
    out: Path,
    work: Path,
    seed: int,
    for_tokenizer: tuple[str, ...],
    for_var: tuple[str, ...],
    smoke: bool,
    resume: bool,
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    toy: list[dict[str, Any]] = [SMOKE_TOKENIZER, SMOKE_VAR] if smoke else [{}, {}]
    try:
        recipes = (
            TokenizerRecipe.digits()
            .with_options(**{"seed": seed, **toy[0], **options(for_tokenizer)})
            .beginning(from_source=False),
            VARRecipe.digits().with_options(**{"seed": seed, **toy[1], **options(for_var)}),
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    command = [
        "python",
        "python/train_digits.py",
        *(["--seed", str(seed)] if seed else []),
    ]
    command += [part for pair in for_tokenizer for part in ("--tokenizer", pair)]
    command += [part for pair in for_var for part in ("--var", pair)] + ["--smoke"] * smoke
    try:
        make(out, work, recipes, shlex.join(command), smoke, resume)
    except (ValueError, OSError, CheckpointError) as error:
        raise click.ClickException(str(error)) from error


def make(
    out: Path,
    work: Path,
    recipes: tuple[TokenizerRecipe, VARRecipe],
    command: str,
    smoke: bool,
    resume: bool,
) -> None:
    """Trains, chooses and measures in the work folder; `out` changes when all of it is done."""
    work.mkdir(parents=True, exist_ok=True)
    if not resume:
        (work / "seconds.json").unlink(missing_ok=True)
    clock = Clock(work / "seconds.json")
    folders = work / "tokenizer", work / "var"
    done = finished(folders[0], recipes[0]) and finished(folders[1], recipes[1])
    if not (resume and done):

        def tokenizer() -> Path:
            return train_tokenizer("digits", folders[0], recipes[0], resume=resume)

        def transformer() -> Path:
            return train_var("digits", folders[0], folders[1], recipes[1], resume=resume)

        clock.run("tokenizer", tokenizer, folders[0] / "log.jsonl")
        clock.run("transformer", transformer, folders[1] / "log.jsonl")

    fresh = var_ext.load(folders[1])
    model = save_model(work / "model", fresh.vae, fresh.var, class_names=NAMES, dtype=torch.float16)
    rounded = var_ext.load(model)  # from here on nothing else is measured

    def choose() -> Choice:
        grid, count = (SMOKE_GRID, 2) if smoke else (GRID, 40)
        return choose_sampling(rounded, **grid, images_per_class=count, progress=True)

    choice = clock.run("choice", choose)
    # Rounding what is rounded changes nothing: this adds the settings to config.json.
    save_model(
        model,
        rounded.vae,
        rounded.var,
        sampling=choice.best.settings,
        class_names=NAMES,
        dtype=torch.float16,
    )
    shipped = var_ext.load(model)

    def measure() -> DigitsReport:
        return evaluate_digits(
            shipped,
            images_per_class=20 if smoke else 100,
            augment=recipes[1].augment,
            copies=recipes[1].copies,
            augment_seed=recipes[1].seed,
            progress=True,
        )

    report = clock.run("measurement", measure)
    write_picture(model / "samples.png", shipped)
    write_card(model, work, recipes, command, choice, report, clock)
    everything = {"report": report.as_dict(), "choice": choice.as_dict()}
    (work / "report.json").write_text(json.dumps(everything, indent=1))
    publish(model, out)
    click.echo(f"{report.as_markdown()}\nwrote {out}")


if __name__ == "__main__":
    main()
