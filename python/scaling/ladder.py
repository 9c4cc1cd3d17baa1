"""A ladder of transformers on images seen once, for `var-ext scaling fit`: sizes, seeds, probes of the learning rate.

    npm ci --prefix python/avatars                                       # once: what draws the pictures
    python python/scaling/ladder.py --tokenizer T --dry-run              # runs, parameters, FLOPs, predicted hours
    python python/scaling/ladder.py --tokenizer T --minutes 110          # a stage; again until it says "done"
    python python/scaling/ladder.py --tokenizer T --minutes 110 --largest-first    # a second worker beside the first

A run is a training of `train_var`, resumed where it was; a finished one is a row of scaling.csv, its validations are
rows of curves.csv, and a probe is a row of probes.csv. Workers share the runs by locks. Every size is trained on the
same images, each seen once.

Rules fixed before the first run: width 32 d and d heads of 32; peak rate at width w of --rate * sqrt(64 / w), which
falls linearly to 1% of itself; batches of 64. Probes with half and twice the rate, at two sizes and a quarter of the
images, say whether the optimum lies inside.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from filelock import FileLock, Timeout
from source import STYLES, first_of, make_tokens, random_tokens
from tables import is_done, keep_run, write_tables

from var_ext.checkpoints import CheckpointError, load_tokenizer, read_json, write_json
from var_ext.cli_options import numbers
from var_ext.models import VQVAE
from var_ext.training import VARRecipe, train_var
from var_ext.training.flops import flops_of
from var_ext.training.interrupts import limited
from var_ext.training.log import read_log
from var_ext.training.network import build_network
from var_ext.training.tokens import digest_of

ROOT = Path(__file__).resolve().parents[2]
BATCH = 64
POINTS = 12  # validations of a run


@dataclass(frozen=True)
class Ladder:
    """What is trained.

    Attributes:
        depths: sizes, in blocks; seeds: seeds of each size, one where none is named.
        probes: sizes whose rates are probed, with these factors.
        images, held_out: training images, a multiple of the batch, and validation images.
        rate: peak learning rate at width 64 and batches of 64.
    """

    depths: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    seeds: dict[int, int] = field(default_factory=lambda: {2: 3, 3: 3})
    probes: tuple[int, ...] = (2, 6)
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    images: int = 770_048
    held_out: int = 4096
    rate: float = 2e-3

    def __post_init__(self) -> None:
        if min(self.depths) < 1:
            raise ValueError(f"a depth must be at least 1, got {min(self.depths)}")

    def runs(self) -> list[Rung]:
        """All, from the least to the most work."""
        rungs = [Rung(depth, seed) for depth in self.depths for seed in range(self.seeds.get(depth, 1))]
        rungs += [Rung(depth, 0, factor, True) for depth in self.probes for factor in self.factors]
        return sorted(rungs, key=lambda rung: rung.depth**3 * (0.25 if rung.probe else 1))

    def recipe(self, rung: Rung) -> VARRecipe:
        width = 32 * rung.depth
        steps = self.steps(rung)
        return VARRecipe(
            seed=rung.seed, epochs=1, batch_size=BATCH, autocast="bf16", depth=rung.depth, embed_dim=width,
            num_heads=rung.depth, drop_path_rate=0.0, init_adaln_gamma=1e-2,
            base_lr=self.rate * rung.factor * math.sqrt(64 / width) * 256 / BATCH, lr_end=0.01,
            validate_steps=max(1, steps // POINTS), top_k=0,
        )  # fmt: skip

    def steps(self, rung: Rung) -> int:
        return self.images // BATCH // (4 if rung.probe else 1)


@dataclass(frozen=True)
class Rung:
    """A run: a size, a seed, and a factor on the rate; a probe sees a quarter of the images."""

    depth: int
    seed: int = 0
    factor: float = 1.0
    probe: bool = False

    @property
    def name(self) -> str:
        return f"d{self.depth}-seed{self.seed}" + (f"-rate{self.factor:g}" if self.probe else "")


def facts(rung: Rung, ladder: Ladder, vae: VQVAE) -> dict[str, Any]:
    """What is known of a run beforehand: parameters as the paper counts them (blocks with AdaLN, without embeddings and
    head) and all of them, training FLOPs of an image by the architecture, and by 6 N a token."""
    recipe = ladder.recipe(rung)
    images = ladder.steps(rung) * BATCH
    flops = flops_of(recipe, vae.schedule, vae.vocab_size, vae.Cvae)
    blocks = 18 * rung.depth * recipe.embed_dim**2
    every = sum(p.numel() for p in build_network(recipe, vae, len(STYLES)).parameters())
    return {
        "run": rung.name, "depth": rung.depth, "width": recipe.embed_dim,
        "seed": rung.seed, "rate": recipe.base_lr * BATCH / 256, "parameters": blocks, "parameters_all": every,
        "images": images, "tokens": images * vae.schedule.num_tokens, "flops": flops * images,
        "flops_6nt": 6 * blocks * images * vae.schedule.num_tokens,
    }  # fmt: skip


def do(rung: Rung, ladder: Ladder, work: Path, tokenizer: str, threads: int) -> None:
    """Trains and measures one run, to the end or until the time is over."""
    vae = load_tokenizer(tokenizer)
    data, out, recipe = (
        work / ("probe-tokens" if rung.probe else "tokens"),
        work / rung.name,
        ladder.recipe(rung),
    )
    train_var(f"tokens:{data}", tokenizer, out, recipe)
    about = {**facts(rung, ladder, vae), "threads": threads}
    keep_run(out, data, recipe, about)
    (out / "last.ckpt").unlink(missing_ok=True)


def predicted(ladder: Ladder, work: Path, tokenizer: str) -> list[dict[str, Any]]:
    """All runs with the seconds that they will take, from a few steps of each size by the trainer itself."""
    vae, rates, table = load_tokenizer(tokenizer), dict[int, float](), []
    data = random_tokens(work / "speed-tokens", tokenizer, 12 * BATCH)
    for rung in ladder.runs():
        if rung.depth not in rates:
            with tempfile.TemporaryDirectory() as folder:
                recipe = ladder.recipe(rung).with_options(log_every=6, validate_steps=0)
                train_var(f"tokens:{data}", tokenizer, folder, recipe, progress=False)
                lines = [line for line in read_log(Path(folder) / "log.jsonl") if line["phase"] == "train"]
                rates[rung.depth] = lines[-1]["images_per_second"]
        about = facts(rung, ladder, vae)
        table.append({**about, "seconds": about["images"] / rates[rung.depth]})
    return table


def pin(work: Path, ladder: Ladder, vae: VQVAE) -> None:
    """Notes what all runs of a folder share; ValueError where it is of other images, rates or another tokenizer."""
    mine = {
        "images": ladder.images, "held_out": ladder.held_out, "rate": ladder.rate, "tokenizer": digest_of(vae)
    }  # fmt: skip
    file = work / "ladder.json"
    if not file.exists():
        write_json(file, mine)
    found = read_json(file)
    for name, value in mine.items():
        if found.get(name) != value:
            raise ValueError(
                f"{work} is of a ladder with {name} {found.get(name)}, got {value}: give the same, or another --work"
            )


@click.command(help=str(__doc__).replace("\n\n    npm", "\n\n\b\n    npm"))
@click.option(
    "--work", type=click.Path(path_type=Path), default=ROOT / "runs/scaling", help="Tokens and runs."
)
@click.option("--tokenizer", required=True, help="Name or folder; frozen.")
@click.option("--depths", type=numbers, help="Sizes, such as 2,3,4.  [default: 2,3,4,5,6,8]")
@click.option(
    "--images", type=click.IntRange(min=4 * BATCH), help="Seen by each run.  [default: 770048, 100M tokens]"
)
@click.option("--held-out", type=click.IntRange(min=2), help="Validation images.  [default: 4096]")
@click.option(
    "--rate", type=click.FloatRange(min=0, min_open=True), help="Peak rate at width 64.  [default: 0.002]"
)
@click.option("--minutes", type=click.FloatRange(min=0), default=0.0, help="Of a stage; 0: no end.")
@click.option("--largest-first", is_flag=True, help="Begin with the most work.")
@click.option("--dry-run", is_flag=True, help="Say what it will take, and end.")
def main(
    work: Path,
    tokenizer: str,
    depths: list[int] | None,
    images: int | None,
    held_out: int | None,
    rate: float | None,
    minutes: float,
    largest_first: bool,
    dry_run: bool,
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given: dict[str, Any] = {
        "images": images and images // (4 * BATCH) * 4 * BATCH,
        "held_out": held_out,
        "rate": rate,
    }
    if depths:
        given |= {
            "depths": tuple(depths),
            "probes": tuple(depth for depth in Ladder.probes if depth in depths),
        }
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        ladder = Ladder(**{name: value for name, value in given.items() if value is not None})
        with limited(minutes):
            tell(ladder, work, tokenizer) if dry_run else climb(ladder, work, tokenizer, largest_first)
    except (ValueError, OSError, CheckpointError) as error:
        raise click.ClickException(str(error)) from error


def tell(ladder: Ladder, work: Path, tokenizer: str) -> None:
    """The prediction, on standard output and in predicted.json."""
    table = predicted(ladder, work, tokenizer)
    for row in table:
        click.echo(
            f"{row['run']:16} {row['parameters'] / 1e6:8.3f}M {row['tokens'] / 1e6:6.1f}M tokens "
            f"{row['flops'] / 1e15:8.2f} PFLOP {row['seconds'] / 3600:6.2f} h"
        )
    click.echo(f"{sum(row['seconds'] for row in table) / 3600:.1f} h of one worker in all")
    write_json(work / "predicted.json", {"runs": table})


def climb(ladder: Ladder, work: Path, tokenizer: str, largest_first: bool) -> None:
    """Tokens and runs, those that are missing."""
    work.mkdir(parents=True, exist_ok=True)
    pin(work, ladder, load_tokenizer(tokenizer))
    tokens = make_tokens(work / "tokens", tokenizer, {"train": ladder.images, "val": ladder.held_out})
    first_of(work / "probe-tokens", tokens, tokenizer, ladder.images // 4)
    runs = ladder.runs()
    names = {rung.name: rung.probe for rung in runs}
    for rung in reversed(runs) if largest_first else runs:
        try:
            with FileLock(work / f"{rung.name}.lock", timeout=0):
                if not is_done(work / rung.name):
                    do(rung, ladder, work, tokenizer, torch.get_num_threads())
        except Timeout:
            continue  # another worker has it
        write_tables(work, names)
    count = write_tables(work, names)
    state = "done: " if count == len(runs) else ""
    click.echo(f"{state}{count} of {len(runs)} runs in {work / 'scaling.csv'}")


if __name__ == "__main__":
    main()
