"""var_ext beside the published code: same weights, machine, process and dtype, in turns.

    python benchmarks/vs_official.py --official DIR                # DIR: a checkout of github.com/FoundationVision/VAR
    python benchmarks/vs_official.py --official DIR --tiny --laps 1 --json /tmp/tiny.json       # seconds on a CPU

The weights are random, and the same for all: speed does not depend on them. Results are compared first; a competitor
with wrong ones is not timed. With the seed of the published generator, fp32 must draw the same tokens as the published
code. Other precisions get the published tokens as input at every scale (teacher forcing), and two figures must be good
enough: the share of equal tokens, and the PSNR of the images. The published code runs in fp32, and in 16 bits under
autocast. On a GPU var_ext also draws as one captured graph; that has its own random stream, and in fp32 must draw the
same as without the graph. Results are compared without TF32, and timed with torch's default: TF32 for
convolutions. Peak memory is that of a fresh process for each competitor.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness.clock import Clock, Timed, Watch, in_turn
from harness.comparison import Comparison, chosen, parser_of
from harness.memory import memory_of
from harness.report import facts
from samplers import (
    OPTIONS,
    PRECISIONS,
    Competitor,
    Graphed,
    Published,
    finite_psnr,
    labels_of,
    make,
    published_model,
)

# The share of equal tokens and the PSNR of the images that a precision must reach to be timed.
WANTED = {"fp32": (1.0, 60.0), "bf16": (0.9, 25.0), "fp16": (0.9, 30.0), "int8": (0.6, 25.0)}
Key = tuple[str, str]  # ("published" or "var_ext", precision)


def names(precisions: list[str], device: torch.device) -> list[Key]:
    """Who is timed: the published code in each precision that it has, var_ext in all, on a GPU also as a graph."""
    graphs = [("var_ext graph", p) for p in precisions] if device.type == "cuda" else []
    published = [("published", p) for p in precisions if p != "int8"]
    shared = [
        ("var_ext shared", p) for p in precisions if p == "fp32"
    ]  # the model's weights, not a packed copy
    return published + shared + [("var_ext", p) for p in precisions] + graphs


# ---------------------------------------------------------------------- answers


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Disables TF32: on a GPU torch may round float32 factors of matmuls and convolutions to 10 bits."""
    places: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    try:
        yield
    finally:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed


@without_tf32()
def compare(competitors: dict[Key, Competitor], reference: Published, batch: int) -> list[dict[str, Any]]:
    """A row for each competitor: tokens equal to those of the published code in fp32, and the images' PSNR."""
    device = reference.var.head.weight.device
    labels = labels_of(batch, device)
    images, tokens = reference.draw(labels, 0)
    lengths = [side * side for side in reference.var.patch_nums]
    rows = []
    for (who, precision), competitor in competitors.items():
        if isinstance(competitor, Graphed):
            share, own_images, eager = competitor.beside_eager(labels)
            row = dict(
                who=who, precision=precision, forced=False, tokens=share, psnr=finite_psnr(own_images, eager)
            )
            rows.append(row)
            competitor.sampler.refresh()  # recaptured for timing, with torch's default settings
            continue
        forced = None if precision == "fp32" else tokens.split(lengths, dim=1)
        own_images, own_tokens = competitor.draw(labels, 0, forced=forced)
        rows.append(
            dict(
                who=who,
                precision=precision,
                forced=forced is not None,
                tokens=(own_tokens == tokens).double().mean().item(),
                psnr=finite_psnr(own_images, images),
            )
        )
    return rows


def wrong(rows: list[dict[str, Any]]) -> list[str]:
    """The reason not to time var_ext."""
    failures = []
    for row in rows:
        share, decibels = WANTED[row["precision"]]
        if row["who"] == "published" or (row["who"] == "var_ext graph" and row["precision"] != "fp32"):
            continue
        if row["tokens"] < share or row["psnr"] < decibels:
            failures.append(
                f"{row['who']} {row['precision']}: {row['tokens']:.2%} of the tokens equal, "
                f"images {row['psnr']:.1f} dB; wanted {share:.0%} and {decibels:.0f} dB"
            )
    return failures


# ---------------------------------------------------------------------- time


def timed(competitors: dict[Key, Competitor], batch: int, laps: int, clock: Clock) -> dict[Key, Timed]:
    labels = labels_of(batch, clock.device)

    def run(competitor: Competitor) -> Callable[[Watch], Any]:
        return lambda watch: competitor.draw(labels, 0, watch=watch)

    return in_turn({key: run(competitor) for key, competitor in competitors.items()}, laps, clock)


def main() -> None:
    parser = parser_of(__doc__, laps=3, batch_sizes=[1, 8], memory=True)
    parser.add_argument("--official", type=Path, required=True, help="folder of the published code")
    options = chosen(parser, PRECISIONS)
    device, official = options.device, str(options.official.resolve())
    var = published_model(options.official, options.depth, device, options.tiny)
    if options.memory_of:
        who, precision, batch = options.memory_of
        draw = partial(make(who, var, precision).draw, labels_of(int(batch), device), 0)
        print(json.dumps(memory_of(draw, device)))
        return
    competitors = {key: make(key[0], var, key[1]) for key in names(options.precisions, device)}
    # a toy has few tokens
    answers = compare(competitors, Published(var, "fp32"), 8 if options.tiny else min(options.batch_sizes))
    for row in answers:
        way = "given the published tokens" if row["forced"] else "on its own"
        print(
            f"{row['who']} {row['precision']}: {row['tokens']:.2%} of tokens equal {way}, images {row['psnr']:.1f} dB"
        )
    if failures := wrong(answers):
        raise SystemExit("not timed, for the answers of var_ext are wrong:\n" + "\n".join(failures))

    flash = any(getattr(block.attn, "using_flash", False) for block in var.blocks)
    parameters = sum(p.numel() for p in var.parameters())
    model = dict(depth=options.depth, parameters=parameters, tiny=options.tiny, flash_attn=flash)
    tf32 = dict(answers=False, time=torch.backends.cudnn.allow_tf32) if device.type == "cuda" else None
    comparison = Comparison(
        "official",
        __file__,
        options,
        about=facts(device),
        model=model,
        options=OPTIONS,
        tf32=tf32,
        answers=answers,
    )
    for batch in options.batch_sizes:
        for (who, precision), result in timed(competitors, batch, options.laps, comparison.clock).items():
            comparison.add(result, who=who, precision=precision, batch=batch)
    del competitors, var
    comparison.clock.release()
    for row in comparison.rows if not options.no_memory else []:
        row["memory"] = comparison.memory(row["who"], row, "--official", official)
        if row["who"] == "var_ext":
            row["released"] = comparison.memory("var_ext released", row, "--official", official)
        comparison.save()
    comparison.save(finished=True)


if __name__ == "__main__":
    main()
