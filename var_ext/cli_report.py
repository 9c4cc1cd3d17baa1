"""The command `var-ext report`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from var_ext.checkpoints import check_writable
from var_ext.cli_options import (
    SEED,
    UserPath,
    given_of,
    numbers,
    precision_option,
    reading_of,
    reading_options,
    sampling_options,
    say,
)
from var_ext.cli_spaces import Network, network_options, space_options

COUNT = click.IntRange(min=1)
SPACE = tuple(field.name for field in fields(Network))


def _values(low: float, high: float = math.inf) -> Callable[[str], list[float]]:
    """A type of option: numbers in a range, "0,1.5,3"."""

    def parse(value: str) -> list[float]:
        try:
            found = [float(part) for part in value.split(",")]
        except ValueError:
            raise click.BadParameter(f"must be numbers such as 0,1.5,3, got {value!r}") from None
        if not all(math.isfinite(x) and low <= x <= high for x in found):
            raise click.BadParameter(f"must be finite numbers in [{low:g}, {high:g}], got {value}")
        return found

    return parse


def _batches(value: str) -> list[int]:
    found = numbers(value)
    if min(found) < 1:
        raise click.BadParameter(f"must be at least 1, got {value}")
    return found


@click.command("report")
@click.argument("model")
@click.option("--out", required=True, type=UserPath(file_okay=False), help="Folder of the page.")
@click.option("--labels", type=numbers, help="Rows of the picture.  [default: all classes, or 8 of many]")
@click.option(
    "--count", type=COUNT, default=8, show_default=True, help="Images of each class in the picture."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the first image.")
@sampling_options
@precision_option
@click.option(
    "--data", help="What the model learned from, for reconstructions and nearest images: as of train."
)
@reading_options
@click.option(
    "--reconstructions", type=COUNT, default=64, show_default=True, help="Of --data: held-out images."
)
@click.option(
    "--neighbours",
    type=COUNT,
    default=100,
    show_default=True,
    help="Of --data: samples whose nearest training images are searched; as many held-out images.",
)
@click.option(
    "--search", type=COUNT, default=10000, show_default=True, help="Of --data: training images, at most."
)
@click.option(
    "--class-images",
    type=COUNT,
    help="Of --data and a space: samples of each class that a linear probe judges; as many held-out images at most.  "
    "[default: as few as make 200]",
)
@click.option(
    "--reference",
    type=UserPath(exists=True),
    help="For the grid: ADM's .npz, or a folder of images.  [default: training images of --data]",
)
@space_options
@network_options
@click.option(
    "--grid-cfg",
    metavar="NUMBERS",
    type=_values(-math.inf),
    default="0,1,1.5,3",
    show_default=True,
    help="Guidance of cells.",
)
@click.option(
    "--grid-top-p",
    metavar="NUMBERS",
    type=_values(0, 1),
    default="0.9,0.96",
    show_default=True,
    help="Likewise; 0 is all.",
)
@click.option("--grid-labels", type=numbers, help="Classes of cells.  [default: all]")
@click.option(
    "--per-class", type=COUNT, help="Images of each class in a cell.  [default: as few as make 100]"
)
@click.option(
    "--speed-batches",
    metavar="NUMBERS",
    type=_batches,
    default="1,16",
    show_default=True,
    help="Images drawn at once, timed.",
)
@click.option("--repeats", type=COUNT, default=3, show_default=True, help="Timed runs; median shown.")
def report(
    model: str,
    out: Path,
    data: str | None,
    geometry: str | None,
    decode: str | None,
    reference: Path | None,
    image_size: int | None,
    cache: Path | None,
    quiet: bool,
    device: str,
    precision: str | None,
    cfg: Any,
    top_k: Any,
    top_p: Any,
    **options: Any,
) -> None:
    """Write a page about MODEL: facts, samples, speed, reconstructions, classes, nearest training images,
    guidance x top-p.

    \b
    Example: var-ext report digits --out page --data digits
    Example: var-ext report var-d16 --out page --reference VIRTUAL_imagenet256_labeled.npz --device cuda --per-class 50
    Example: var-ext report runs/var --out page --data photos/ --features lite0 --lite0 efficientnet_lite0.whl
    Markdown with pictures and plots; what is lacking for a section stands in its place. --cfg and --top-p are of its
    samples, cells have their own. The same command goes on after a kill, and computes only what is not there or was
    asked for otherwise; ranks of torchrun share features.
    """
    from var_ext import load
    from var_ext.data import load_dataset
    from var_ext.evaluation import ReportOptions, write_model_report
    from var_ext.evaluation.fid_reference import read_reference
    from var_ext.evaluation.model_report import PAGE
    from var_ext.export import local_device
    from var_ext.info import installation, model_rows

    device = local_device(device)
    network, spaced = Network.taken(options), bool(given_of(*SPACE))
    _check_options(data, reference, spaced)
    if spaced:
        network.check()
    check_writable(out / PAGE)
    if cache is not None:
        check_writable(cache / ".check")
    sampler = load(model, device=device, precision=precision)
    splits = None
    if data is not None:
        reading = reading_of(model, data, geometry, decode)
        train, val = (load_dataset(data, split, sampler.image_size, **reading) for split in ("train", "val"))
        splits = (train, val)
    compared = None if reference is None else read_reference(reference, image_size)
    extractor = None
    if spaced or compared is not None:
        extractor = network.extractor(device)
    page = write_model_report(
        sampler,
        os.path.basename(os.path.normpath(model)),
        out,
        options=ReportOptions(sampling={"cfg": cfg, "top_k": top_k, "top_p": top_p}, **options),
        data=splits,
        reference=compared,
        extractor=extractor,
        facts=model_rows(model),
        machine=installation(),
        cache=cache,
        progress=not quiet,
    )
    if page is not None:
        say(f"page: {page.resolve()}")


def _check_options(data: str | None, reference: Path | None, spaced: bool) -> None:
    """Refuse options that would be of no effect."""
    of_data = given_of("geometry", "decode", "reconstructions", "neighbours", "search", "class_images")
    if data is None and of_data:
        raise click.UsageError(f"{of_data} are of images: name them with --data")
    if reference is None and (given := given_of("image_size")):
        raise click.UsageError(f"{given} is of pictures of --reference, got none")
    if data is None and reference is None and spaced:
        raise click.UsageError(f"{given_of(*SPACE)} are of --reference or --data, got neither")
    if not spaced and reference is None and given_of("class_images"):
        raise click.UsageError(
            "--class-images is of a probe in a feature space: give its weights, such as --lite0"
        )
    of_grid = given_of("grid_cfg", "grid_top_p", "grid_labels", "per_class")
    if reference is None and of_grid and not (data is not None and spaced):
        raise click.UsageError(
            f"{of_grid} are of the guidance grid: give it --reference, or --data and the weights of a space"
        )
