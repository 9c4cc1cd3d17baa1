"""What is kept of the making of the avatars model beside its weights: the card, pictures, curves and logs."""

from __future__ import annotations

import csv
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from avatars_figures import Held
from making import Clock, found, listing, size_of

import var_ext
from var_ext.evaluation.dataset_images import DatasetImages
from var_ext.evaluation.image_sources import DrawnImages
from var_ext.export import evaluation_plan
from var_ext.grid import labelled_grid
from var_ext.training import TokenizerRecipe, VARRecipe
from var_ext.training.log import read_log

WORST = 8  # of a style, in the picture of failures
ROWS = 256  # compared at once
EVERY = 50  # steps between two lines of a log that is kept, and those of validation
KEYS = ("fd", "kd", "precision", "recall")
NUMBERS = (
    "loss",
    "l1",
    "l2",
    "perceptual",
    "adversarial",
    "critic",
    "accuracy",
    "loss_last",
    "accuracy_last",
)

PRESETS: dict[str, TokenizerRecipe | VARRecipe] = {
    "tokenizer": TokenizerRecipe.small(), "transformer": VARRecipe.digits(), "decoder": TokenizerRecipe.small(),
}  # fmt: skip

CARD = """\
# avatars

Draws portraits of {side} x {side} pixels in {styles} art styles, one class a style: a multi-scale VQVAE and a
transformer that predicts its tokens scale by scale (VAR, arXiv 2404.02905), both trained by this project
from random weights on two CPU cores.

- Tokenizer: {vae_size}. Transformer: {var_size}. Stored as fp16.
- Token maps: {maps} = {tokens} tokens of {codes} codes.
- Recommended sampling, as in `config.json`: {sampling}.
- The styles are those of [DiceBear](https://www.dicebear.com), by the artists in [NOTICE](NOTICE), under CC0 1.0 and
  CC BY 4.0: keep the notice with the model, and name the artist of a style beside pictures in it.
- Meant for demonstrations, tests and experiments. It knows nothing but these styles, at this size.

![One row a style, one column a seed](samples.png)

## Data

{train} portraits to train and {held_out} held-out ones, drawn by `python/avatars/render.py`; no portrait is in
both.

## Training

```
{command}
```

{total:.1f} hours in all on {threads} CPU threads ({machine}, torch {torch}): tokenizer {tokenizer_time}, tokens and
transformer {transformer_time}, decoder {decoder_time}, choice of the settings and measurement {measurement_time}. The
tokenizer is trained without a critic; afterwards its decoder alone with LPIPS (stlpips) and a critic, which leaves
encoder, codes and so all tokens as they were. Logs and curves: `docs/avatars/` of the repository.

- Tokenizer: the preset "small" with {tokenizer_recipe}. On held-out pictures: {tokenizer_found}.
- Transformer: the preset "digits" with {transformer_recipe}. On held-out pictures: {transformer_found}.
- Decoder: the preset "small" with {decoder_recipe}. On held-out pictures: {decoder_found}.

## Measured quality

All in the space of EfficientNet-lite0 (ImageNet), which had no part in the training, on the weights of this folder:
{count} images of each set against the {held_out} held-out pictures. "Real" are training pictures.

| measure | samples | reconstructions | real |
| --- | --- | --- | --- |
| FD-lite0 | **{samples_fd:.2f}** | {reconstructions_fd:.2f} | {real_fd:.2f} |
| - over that of real (goal: at most 3) | **{over_real:.2f}** | {reconstructions_over_real:.2f} | 1 |
| - over that of reconstructions (goal: at most 1.5) | **{over_reconstructions:.2f}** | 1 | |
| kernel distance KD-lite0 | {samples_kd:.5f} | {reconstructions_kd:.5f} | {real_kd:.5f} |
| precision | {samples_precision:.3f} | {reconstructions_precision:.3f} | {real_precision:.3f} |
| recall | {samples_recall:.3f} | {reconstructions_recall:.3f} | {real_recall:.3f} |

| of | samples | held-out pictures |
| --- | --- | --- |
| style that a linear probe sees is the asked one (goal: at least 98%) | **{accuracy:.1%}** | {real_accuracy:.1%} |
| - worst style | {worst_accuracy:.1%} ({worst}) | {worst_real:.1%} |
| variety within a style, over that of held-out pictures | {spread:.2f} ({narrowest_spread:.2f} for {narrowest}) | 1 |
| distance to the nearest training picture: median | {nearest:.2f} | {real_nearest:.2f} |
| - nearer than 99 of 100 held-out pictures | {near:.1%} | 1.0% |

Measured again by

```
var-ext eval fid avatars --reference DATA/val --features lite0 --lite0 LITE0 --per-class {per_class}
var-ext report avatars --data DATA --lite0 LITE0 --class-images {per_probe} --out PAGE
```

The page of this model, with the grid of guidance and top-p, styles one by one, nearest training pictures and speed, is
`docs/avatars/report.md` of the repository.

## Best of n

The {kept} images a style that the model itself finds likeliest, of as many candidates as the share says:

| share kept | FD-lite0 | style as asked | variety |
| --- | --- | --- | --- |
{best}

## Failures

Of {per_class} samples of each style those that lie farthest from any held-out picture, the farthest first:

![The worst samples of each style](failures.png)
"""


def write_samples(path: Path, sampler: var_ext.Sampler, count: int = 8) -> None:
    """The picture that `var-ext sample` draws of these weights: (styles x count) images."""
    labels, seeds = range(sampler.num_classes), range(count)
    images = sampler([i for i in labels for _ in seeds], [j for _ in labels for j in seeds])
    labelled_grid(images, sampler.class_names or [], [str(seed) for seed in seeds]).save(path, format="PNG")


def write_failures(path: Path, held: Held, per_class: int) -> None:
    """The samples of each class that are farthest from any held-out picture."""
    samples = DrawnImages(held.sampler, evaluation_plan(held.sampler.num_classes, per_class), "avatars")
    mine, labels = held.features(samples)
    theirs, _ = held.features(DatasetImages(held.held_out))
    distances = torch.cat([torch.cdist(rows, theirs).amin(1) for rows in mine.split(ROWS)])  # (N,)
    names = held.sampler.class_names or []
    places = [(labels == label).nonzero().flatten() for label in range(len(names))]
    worst = [place[distances[place].argsort(descending=True)[:WORST]].tolist() for place in places]
    pixels = [torch.from_numpy(samples.load(range(i, i + 1))[0]) for row in worst for i in row]
    images = torch.stack(pixels).permute(0, 3, 1, 2).float() / 255
    labelled_grid(images, names, [str(i + 1) for i in range(len(worst[0]))]).save(path, format="PNG")


def keep_logs(work: Path, out: Path) -> None:
    """Logs as CSV, thinned, and one picture of the losses over the hours of each training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.2), layout="constrained")
    for axis, part in zip(figure.subplots(1, 3), ("tokenizer", "transformer", "decoder"), strict=True):
        lines = read_log(work / part / "log.jsonl")
        kept = [line for line in lines if line["phase"] != "train" or line["step"] % EVERY == 0]
        names = [name for name in NUMBERS if any(name in line for line in kept)]
        with (out / f"{part}.csv").open("w", newline="") as handle:
            rows = csv.writer(handle, lineterminator="\n")
            rows.writerow(["step", "phase", "seconds", *names])
            rows.writerows([line[key] for key in ("step", "phase", "seconds")] + [line.get(name, "") for name in names]
                           for line in kept)  # fmt: skip
        for phase in ("train", "val"):
            mine = [line for line in lines if line["phase"] == phase]
            axis.plot([line["seconds"] / 3600 for line in mine], [line["loss"] for line in mine],
                      marker="o" if phase == "val" else "", linewidth=0.8, label=phase)  # fmt: skip
        axis.set_title(f"{part}: loss")
        axis.set_xlabel("hours")
        axis.legend()
    figure.savefig(out / "curves.png", format="png", dpi=80)


def copy_page(page: Path, out: Path) -> None:
    """The page and its pictures, without the results that it goes on from."""
    shutil.copytree(page, out, ignore=shutil.ignore_patterns("*.json", "guidance"), dirs_exist_ok=True)


def write_card(
    model: Path,
    work: Path,
    recipes: Mapping[str, Any],
    command: str,
    measured: Mapping[str, Any],
    clock: Clock,
) -> None:
    """README.md of the model folder.

    Args:
        recipes: of the trainings, by folder below `work`.
        measured: see `avatars_figures.measure`.
    """
    sampler = var_ext.load(model)
    schedule = sampler.vae.schedule
    figures, styles, near = measured["figures"], measured["classes"], measured["neighbours"]
    numbers = {f"{name}_{key}": each[key] for name, each in figures.items() for key in KEYS}
    worst, narrowest = (min(styles, key=lambda row: row[key]) for key in ("samples", "spread"))
    best = [
        f"| {row['keep']:g} | {row['fd']:.2f} | {row['accuracy']:.1%} | {row['spread']:.2f} |"
        for row in measured["best"]
    ]
    facts = figures["samples"]["report"]["facts"]
    text = CARD.format(
        **numbers,
        side=sampler.image_size,
        styles=sampler.num_classes,
        vae_size=size_of(sampler.vae, model / "vae.safetensors"),
        var_size=size_of(sampler.var, model / "var.safetensors"),
        maps=", ".join(f"{p}x{p}" for p in schedule.patch_nums),
        tokens=schedule.num_tokens,
        codes=sampler.vae.quantize.vocab_size,
        sampling=", ".join(f"{name} {value}" for name, value in measured["sampling"].items()),
        **measured["pictures"],
        command=command,
        total=sum(clock.seconds.values()) / 3600,
        threads=torch.get_num_threads(),
        machine=platform.machine(),
        torch=torch.__version__,
        **{f"{part}_time": clock.minutes(part) for part in clock.seconds},
        **{f"{part}_recipe": listing(recipe, PRESETS[part]) for part, recipe in recipes.items()},
        **{f"{part}_found": found(work / part / "log.jsonl", recipe) for part, recipe in recipes.items()},
        count=facts["count"],
        per_class=facts["least_per_class"],
        per_probe=measured["probed"],
        over_real=numbers["samples_fd"] / numbers["real_fd"],
        reconstructions_over_real=numbers["reconstructions_fd"] / numbers["real_fd"],
        over_reconstructions=numbers["samples_fd"] / numbers["reconstructions_fd"],
        accuracy=fmean(row["samples"] for row in styles),
        real_accuracy=fmean(row["held_out"] for row in styles),
        worst=worst["class"],
        worst_accuracy=worst["samples"],
        worst_real=min(row["held_out"] for row in styles),
        spread=fmean(row["spread"] for row in styles),
        narrowest=narrowest["class"],
        narrowest_spread=narrowest["spread"],
        nearest=near["samples_median"],
        real_nearest=near["real_median"],
        near=near["near"],
        kept=measured["best"][0]["kept"],
        best="\n".join(best),
    )
    (model / "README.md").write_text(text, encoding="utf-8")
