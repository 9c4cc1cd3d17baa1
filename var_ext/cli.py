"""The command line: `var-ext sample | edit | train | eval | reference | report | scaling | convert | info | bench |
web`.

Commands parse, call the public functions and print. What is slow to import is imported inside them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from var_ext.checkpoints import check_writable
from var_ext.cli_eval import evaluate
from var_ext.cli_fid import reference
from var_ext.cli_options import (
    SEED,
    Group,
    UserPath,
    asked_candidates,
    asked_recipe,
    check_plan_options,
    control_options,
    editing_options,
    four_numbers,
    images_option,
    keep_options,
    machine_options,
    model_option,
    numbers,
    picture_option,
    plan_options,
    precision_option,
    recipe_options,
    sampling_options,
    say,
    stages_option,
    train_options,
    writes_images,
)
from var_ext.cli_report import report
from var_ext.cli_scaling import scaling
from var_ext.cli_tokens import tokens
from var_ext.cli_web import web

if TYPE_CHECKING:
    from torch import Tensor

    from var_ext import Sampler


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="var_ext", prog_name="var-ext")
def main() -> None:
    """Visual autoregressive image models: sample, edit, train, evaluate, convert.

    \b
    Example: var-ext sample
    """


@main.command()
@model_option
@click.option("--labels", type=numbers, help="Classes, such as 3,5,8 or 0-9.  [default: all, or 8 of many]")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the first column.")
@click.option(
    "--count", type=click.IntRange(min=1), default=8, show_default=True, help="Images of each class."
)
@sampling_options
@control_options
@keep_options
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Images drawn at once.  [default: what fits; of exports 32]",
)
@precision_option
@images_option
@stages_option
@click.option("--quiet", is_flag=True, help="No progress bar.")
@machine_options
def sample(
    model: str,
    labels: list[int] | None,
    seed: int,
    count: int,
    keep: float | None,
    candidates: int | None,
    score: str | None,
    batch_size: int | None,
    precision: str | None,
    out: str,
    stages: Path | None,
    quiet: bool,
    device: str,
    **options: Any,
) -> None:
    """Draw a grid of images, one row a class, one column a seed; or many images, one by one.

    \b
    Example: var-ext sample --labels 3,5,8 --count 10 --cfg 2 --out digits.png
    The image of a class and a seed is the same in every grid.
    \b
    Example: var-ext sample --labels 3,5,8 --count 1 --stages digits.gif
    How these images come about, coarse to fine: animated, or in NAME.png with a column a scale.
    \b
    Example: var-ext sample --model var-d16 --count 50 --out samples.npz
    Example: torchrun --nproc-per-node 8 -m var_ext sample --model var-d16 --count 50 --device cuda --out pngs/
    Classes take turns and each image has the next seed. The same command goes on with a run that was stopped.
    Ranks are those of torchrun, srun or mpirun; the first waits for the others and says for which.
    \b
    Example: var-ext sample --model var-d16 --count 50 --keep 0.05 --score classifier:lite0.whl --out samples.npz
    Example: var-ext sample --labels 0-9 --candidates 100 --score likelihood --out best.png
    Draws 20 candidates an image and keeps the best 5% of each class; in a grid the best come first. Their scores
    are kept beside the images, in samples.npz.scores.
    """
    from var_ext import load
    from var_ext.evaluation import named_score
    from var_ext.export import evaluation_plan, export_best, export_images, local_device
    from var_ext.grid import labelled_grid, save_picture, shown_classes
    from var_ext.show import class_name

    drawn = asked_candidates(keep, candidates, score, count)
    if stages is not None and (drawn or writes_images(out)):
        came = "candidates" if drawn else f"--out {out}, which takes the images one by one"
        raise click.UsageError(f"--stages shows how the images of a grid come about, got {came}")
    if drawn and labels and len(set(labels)) < len(labels):
        raise click.UsageError(f"--labels must differ where candidates are chosen, got {labels}")
    sampler = load(model, device=local_device(device), precision=precision)
    scorer = named_score(score, sampler) if score else None
    if writes_images(out):
        given = {name: value for name, value in options.items() if value is not None and value is not False}
        classes = sampler.num_classes if labels is None else labels
        plan = evaluation_plan(
            classes, drawn or count, seed, batch_size=batch_size or 32, **{**sampler.defaults, **given}
        )
        seeds_text = f"seeds {seed}-{seed + len(plan) - 1}"
        if scorer:
            best = export_best(
                sampler, plan, out, scorer, keep=count if keep is None else keep, progress=not quiet
            )
            say(f"{_chosen(best.kept, len(plan), best.mean_of_kept, best.mean_of_all, scorer.name)}")
            say(f"of {model}, {seeds_text}: {best.path.resolve()}")
            return
        path = export_images(sampler, plan, out, progress=not quiet)
        say(f"{len(plan)} images of {model}, {seeds_text}: {path.resolve()}")
        return
    labels = shown_classes(sampler.num_classes) if labels is None else labels
    seeds = list(range(seed, seed + (drawn or count)))
    each_label, each_seed = [each for each in labels for _ in seeds], seeds * len(labels)
    start = time.perf_counter()
    if scorer:
        kept = sampler.best_of(
            each_label, each_seed, scorer, count, batch_size=batch_size, progress=not quiet, **options
        )
        images, columns = kept.images.cpu(), [str(i + 1) for i in range(count)]
    else:
        if stages is None:
            images = sampler(each_label, each_seed, batch_size=batch_size, **options).cpu()
        else:
            columns_of_stages = count if count > 1 else 8  # one of each class: side by side
            images = _with_stages(
                sampler, each_label, each_seed, batch_size, stages, columns_of_stages, options
            )
        columns = [str(each) for each in seeds]
    seconds = time.perf_counter() - start
    names = [class_name(sampler.class_names, label) for label in labels]
    save_picture(labelled_grid(images, names, columns), out)
    total = len(each_seed)
    click.echo(f"{total} images of {model} in {seconds:.2f} s: {total / seconds:.1f} images/s")
    seeds_text = f"seeds {seeds[0]}-{seeds[-1]}"
    if scorer:
        click.echo(_chosen(len(images), total, kept.mean, kept.mean_of_all, scorer.name))
        click.echo(f"rows are classes, columns the best of {seeds_text}: {Path(out).resolve()}")
    else:
        click.echo(f"rows are classes, columns {seeds_text}: {Path(out).resolve()}")


def _with_stages(
    sampler: Sampler,
    labels: list[int],
    seeds: list[int],
    batch_size: int | None,
    path: Path,
    columns: int,
    options: dict[str, Any],
) -> Tensor:
    """Images (N, 3, S, S) as a call draws them, on the CPU; how they come about is written to `path`."""
    import torch

    from var_ext import show

    size = sampler.batch_size(batch_size)
    parts = [
        sampler.scales(labels[at : at + size], seeds[at : at + size], **options).cpu()
        for at in range(0, len(labels), size)
    ]
    stages = torch.cat(parts, dim=1)  # (K, N, 3, S, S)
    sides = sampler.vae.schedule.patch_nums
    show(stages, labels, names=sampler.class_names, columns=columns, scales=sides).save(path)
    click.echo(f"coarse to fine: {path.resolve()}")
    return stages[-1]


def _chosen(kept: int, drawn: int, mean_of_kept: float, mean_of_all: float, score: str) -> str:
    return (
        f"kept {kept} of {drawn} candidates ({100 * kept / drawn:.3g}%): mean {score} {mean_of_kept:.4g}, "
        f"of all {mean_of_all:.4g}"
    )


@main.command()
@click.argument("image", type=UserPath())
@model_option
@click.option(
    "--mask", type=UserPath(), help="Picture of IMAGE's size; white is replaced, transparent is kept."
)
@click.option(
    "--box",
    callback=four_numbers,
    help="x0,y0,x1,y1: left, top, right, bottom of what is replaced, in shares of the side.",
)
@click.option("--outside", is_flag=True, help="Replace what lies outside mask or box.")
@click.option("--label", type=click.IntRange(min=0), help="Class to draw.  [default: none, what fits]")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the first image.")
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True, help="Images to draw.")
@editing_options
@control_options
@precision_option
@click.option("--paste", is_flag=True, help="Put the pixels of IMAGE back where the mask is not.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Images drawn at once.  [default: what fits]")
@picture_option
@machine_options
def edit(
    image: Path,
    model: str,
    mask: Path | None,
    box: tuple[float, ...],
    outside: bool,
    label: int | None,
    seed: int,
    count: int,
    paste: bool,
    batch_size: int | None,
    precision: str | None,
    out: Path,
    device: str,
    **options: Any,
) -> None:
    """Draw a part of IMAGE anew: the white part of a mask, a box, or what lies outside.

    \b
    Example: var-ext edit photo.png --model var-d16 --box 0.2,0.2,0.8,0.8 --count 4 --paste
    Example: var-ext edit photo.png --model var-d16 --mask mask.png --label 207 --out dog.png
    IMAGE is cut to the square in its middle and brought to the model's size.
    In a mask white is replaced; black and what is transparent are kept.
    """
    from var_ext import load
    from var_ext.data.pictures import load_picture
    from var_ext.editing import Region
    from var_ext.grid import edit_sheet, save_picture, to_pil
    from var_ext.show import class_name

    if bool(mask) == bool(box):
        raise click.UsageError("wanted either --mask or --box, got " + ("both" if box else "neither"))
    seeds = list(range(seed, seed + count))
    outs = [out] if count == 1 else [out.with_stem(f"{out.stem}-{each}") for each in seeds]
    sheet = out.with_name(f"{out.stem}-sheet.png")
    for path in (sheet, *outs):
        check_writable(path)
    sampler = load(model, device=device, precision=precision)
    size, grid = sampler.image_size, sampler.vae.schedule.side
    picture, painted = load_picture(image, size, mask)
    region = Region.of(box if painted is None else painted, image_size=size, grid=grid, outside=outside)
    if not region.replace.any():
        raise click.UsageError("wanted something to replace, got a mask without any in the middle square")
    edited = sampler.edit(
        picture,
        region.replace,
        label,
        seeds,
        paste=paste,
        batch_size=batch_size,
        **options,
    ).cpu()
    name = class_name(sampler.class_names, sampler.num_classes if label is None else label)
    pictures = to_pil(edited)
    pictures.append(edit_sheet(picture, region.replace[0], edited, name, [str(each) for each in seeds]))
    for path, drawn in zip((*outs, sheet), pictures, strict=True):
        save_picture(drawn, path)
    share = 100 * (1 - region.keep.float().mean().item())
    click.echo(f"{share:.0f}% of the finest tokens drawn anew, seeds {seeds[0]}-{seeds[-1]}, {name}")
    click.echo(f"edited: {outs[0].resolve()}" + (f" ... {outs[-1].name}" if count > 1 else ""))
    click.echo(f"before, mask, after: {sheet.resolve()}")


@main.group(cls=Group)
def train() -> None:
    """Train a tokenizer, then a transformer on its tokens.

    \b
    Example: var-ext train tokenizer digits --out runs/tokenizer
             var-ext train var digits --tokenizer runs/tokenizer --out runs/var
    DATA is `digits`; a folder with one folder of images (png, jpg, webp, bmp, tif, ppm, pgm) for each class, or
    with train/ and val/ of such folders; `wds:PATTERN`, tar shards as WebDataset writes them, such as
    wds:data/{split}-*.tar; or `hf:NAME`, a data set of the hub or a folder that save_to_disk wrote; for a transformer
    also `tokens:FOLDER` of `var-ext tokens`. A run that was stopped goes on where it was when the same command is given
    again.
    """


@train.command("tokenizer")
@click.argument("data")
@click.option(
    "--init-from",
    help="Folder or name of a tokenizer to begin with. Options that are not given, and no --preset, are then its sizes "
    "and a recipe that trains the decoder alone, so codes stay; with --preset too, its codes are the first ones unless "
    "--codebook-init is given.  [default: none]",
)
@click.option(
    "--image-size",
    type=click.IntRange(min=1),
    help="Side of the images: --ch-mult with as many levels as lead to the last of --patch-nums.",
)
@plan_options
@train_options("TokenizerRecipe")
@machine_options
@recipe_options("TokenizerRecipe")
def train_tokenizer_command(
    data: str,
    init_from: str | None,
    image_size: int | None,
    dry_run: bool,
    ranks: int | None,
    memory: float | None,
    out: Path,
    preset: str | None,
    resume: bool,
    quiet: bool,
    device: str,
    **options: Any,
) -> None:
    """Train a tokenizer on the images of DATA.

    \b
    Example: var-ext train tokenizer digits --out runs/tokenizer --epochs 20
    Example: var-ext train tokenizer photos/ --out runs/tokenizer --image-size 64
    Example: var-ext train tokenizer photos/ --out runs/paper --preset paper --lpips vgg.pth --discriminator dino.pth
    Example: var-ext train tokenizer photos/ --out runs/tuned --init-from var-d16 --lpips stlpips
    """
    from var_ext.training import TokenizerRecipe, train_tokenizer

    recipe = asked_recipe(TokenizerRecipe, data, preset, init_from, options)
    if image_size is not None:
        if options["ch_mult"] is not None:
            raise click.UsageError("--image-size sets --ch-mult, got both")
        recipe = recipe.sized(image_size)
    recipe = recipe.beginning(init_from is not None)
    if dry_run:
        from var_ext.training.tokenizer_plan import describe

        say(describe(recipe, device, ranks, memory))
        return
    check_plan_options(ranks, memory)
    path = train_tokenizer(
        data, out, recipe, init_from=init_from, resume=resume, progress=not quiet, device=device
    )
    say(f"tokenizer: {path}")


@train.command("var")
@click.argument("data")
@click.option("--tokenizer", help="Folder or name of the tokenizer.  [default: that of --init-from]")
@click.option(
    "--init-from",
    help="Folder or name of a model to begin with. Options that are not given, and no --preset, are then its sizes and "
    "a recipe for few images.  [default: none]",
)
@plan_options
@train_options("VARRecipe")
@machine_options
@recipe_options("VARRecipe")
def train_var_command(
    data: str,
    tokenizer: str | None,
    init_from: str | None,
    dry_run: bool,
    ranks: int | None,
    memory: float | None,
    out: Path,
    preset: str | None,
    resume: bool,
    quiet: bool,
    device: str,
    **options: Any,
) -> None:
    """Train a transformer on the tokens of the images of DATA.

    \b
    Example: var-ext train var digits --tokenizer runs/tokenizer --out runs/var
    Example: var-ext train var photos/ --tokenizer var-d16 --out runs/var --depth 16
    Example: torchrun --nproc-per-node 8 -m var_ext train var photos/ --tokenizer var-d16 --out runs/var --device cuda
    Example: var-ext train var photos/ --tokenizer var-d16 --out runs/var --depth 30 --dry-run --ranks 8 --memory 80
    Example: var-ext train var photos/ --init-from var-d16 --out runs/tuned --freeze "blocks.{0-7}.*"
    Example: var-ext train var photos/ --init-from var-d16 --out runs/adapter --lora 16 --lora-save adapter
    Afterwards: var-ext sample --model runs/var
    """
    from var_ext.training import VARRecipe, train_var

    tokenizer = tokenizer or init_from
    if tokenizer is None:
        raise click.UsageError("--tokenizer or --init-from must name the tokenizer, got neither")
    recipe = asked_recipe(VARRecipe, data, preset, init_from, options)
    if dry_run:
        from var_ext.training.plan import describe

        say(describe(recipe, data, tokenizer, device, ranks, memory, init_from))
        return
    check_plan_options(ranks, memory)
    path = train_var(
        data, tokenizer, out, recipe, init_from=init_from, resume=resume, progress=not quiet, device=device
    )
    say(f"model: {path}\ndraw from it: var-ext sample --model {path}")


for command in (tokens, evaluate, reference, report, scaling, web):
    main.add_command(command)


@main.command()
@click.argument("files", nargs=-1, required=True, type=UserPath(exists=True))
@click.option("--out", required=True, type=UserPath(), help="Folder to write.")
@click.option("--patch-nums", type=numbers, help="Sides of the scales, where the files do not tell.")
@click.option("--num-heads", type=click.IntRange(min=1), help="Heads, where the files do not tell.")
@click.option("--half", is_flag=True, help="Store fp16: half the size, loaded as fp32.")
def convert(
    files: tuple[Path, ...], out: Path, patch_nums: list[int] | None, num_heads: int | None, half: bool
) -> None:
    """Turn published .pth FILES (the tokenizer's, then the transformer's) or a training run into a model folder.

    \b
    Example: var-ext convert vae_ch160v4096z32.pth var_d16.pth --out models/var-d16
    Example: var-ext convert ar-ckpt-best.pth --out models/mine
    Example: var-ext convert runs/var --out models/now
    Example: var-ext convert runs/var/step-2000.ckpt --out models/then
    The second form takes a checkpoint of the published trainer, which has both; the third a run that is not done, or
    any model folder, the last one a checkpoint that --keep kept.
    """
    import torch

    from var_ext import checkpoints
    from var_ext.info import describe_model

    if len(files) > 2:
        raise click.UsageError(f"FILES must be one or two, got {len(files)}")
    var_pth = files[1] if len(files) == 2 else None
    dtype = torch.float16 if half else torch.float32
    path = checkpoints.convert(
        files[0], var_pth, out, patch_nums=patch_nums, num_heads=num_heads, dtype=dtype
    )
    click.echo(describe_model(path))


@main.command()
@click.argument("model", required=False)
def info(model: str | None) -> None:
    """Show build, chip, versions and op backends, or what a MODEL is.

    \b
    Example: var-ext info
    Example: var-ext info var-d16
    """
    from var_ext.info import describe_installation, describe_model

    click.echo(describe_installation() if model is None else describe_model(model))


@main.command()
@click.argument("model", default="digits")
@click.option(
    "--batch-sizes", type=numbers, default="1,8,32", show_default=True, help="Images drawn at once."
)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Timed runs; median shown."
)
@click.option(
    "--precisions",
    default="fp32,bf16",
    show_default=True,
    help="Of fp32, bf16, fp16 and int8, to be compared.",
)
@machine_options
def bench(model: str, batch_sizes: list[int], repeats: int, precisions: str, device: str) -> None:
    """Time the sampler end to end and its parts, and measure what each precision costs in accuracy.

    \b
    Example: var-ext bench digits --batch-sizes 1,64 --precisions bf16,int8 --threads 1
    """
    from var_ext import load
    from var_ext.bench import deviation, measure

    for precision in precisions.split(","):
        sampler = load(model, device=device, precision=precision.strip())
        for batch in batch_sizes:
            click.echo(measure(sampler, batch, repeats=repeats).as_text())
        click.echo(deviation(sampler, sampler.precision.name).as_text())
