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

import argparse
import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from samplers import OPTIONS, Competitor, Graphed, Published, labels_of, make, precisions_on, published_model
from tables import duration
from versus import (
    Timed,
    Watch,
    about,
    add_file_options,
    finite_psnr,
    in_fresh_process,
    memory_of,
    numbers,
    release,
    time_in_turn,
    words,
    write,
)

from var_ext.engine.memory import out_of_memory

# The share of equal tokens and the PSNR of the images that a precision must reach to be timed.
WANTED = {"fp32": (1.0, 60.0), "bf16": (0.9, 25.0), "fp16": (0.9, 30.0), "int8": (0.6, 25.0)}
Key = tuple[str, str]  # ("published" or "var_ext", precision)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--official", type=Path, required=True, help="folder of the published code")
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument(
        "--batch-sizes", type=numbers, default=[1, 8], help="what does not fit is reported so"
    )
    parser.add_argument(
        "--precisions", type=words, default=None, help="of fp32, bf16, fp16 (GPU), int8 (CPU)"
    )
    parser.add_argument("--laps", type=int, default=3)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument(
        "--tiny", action="store_true", help="a toy tokenizer and four scales; takes --depth 2"
    )
    parser.add_argument("--no-memory", action="store_true", help="start no processes to measure memory")
    add_file_options(parser)
    parser.add_argument("--memory-of", nargs=3, metavar=("WHO", "PRECISION", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.depth = 2
    possible = precisions_on(options.device)
    options.precisions = options.precisions or list(possible)
    if unknown := set(options.precisions) - set(possible):
        parser.error(f"--precisions may be {', '.join(possible)} here, got {', '.join(sorted(unknown))}")
    return options


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


def timed(
    competitors: dict[Key, Competitor], batch: int, laps: int, device: torch.device
) -> dict[Key, Timed]:
    labels = labels_of(batch, device)

    def run(competitor: Competitor) -> Callable[[Watch], Any]:
        return lambda watch: competitor.draw(labels, 0, watch=watch)

    by_name = {" ".join(key): run(competitor) for key, competitor in competitors.items()}
    results = time_in_turn(by_name, laps, device)
    return {key: results[" ".join(key)] for key in competitors}


def memory_worker(options: argparse.Namespace) -> None:
    """Prints the memory of one competitor, alone in this process."""
    who, precision, batch = options.memory_of
    competitor = make(
        who, published_model(options.official, options.depth, options.device, options.tiny), precision
    )
    labels = labels_of(int(batch), options.device)
    try:
        print(json.dumps(memory_of(functools.partial(competitor.draw, labels, 0), options.device)))
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        print(json.dumps(dict(error="out of memory")))


def memory(options: argparse.Namespace, key: Key, batch: int) -> dict[str, Any]:
    """The same from a fresh process."""
    passed = ["--official", str(options.official.resolve()), "--depth", str(options.depth)]
    passed += ["--device", str(options.device), *(["--tiny"] if options.tiny else [])]
    return in_fresh_process(__file__, [*passed, "--memory-of", *key, str(batch)])


def main() -> None:
    options = arguments()
    if options.memory_of:
        memory_worker(options)
        return
    device = options.device
    var = published_model(options.official, options.depth, device, options.tiny)
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
    rows: list[dict[str, Any]] = []
    report = dict(about=about(device), model=model, options=OPTIONS, laps=options.laps, tf32=tf32)
    report |= dict(answers=answers, rows=rows)
    for batch in options.batch_sizes:
        for (who, precision), result in timed(competitors, batch, options.laps, device).items():
            rows.append(dict(who=who, precision=precision, batch=batch, **result.as_dict()))
            if result.seconds:
                print(f"batch {batch}, {who} {precision}: {duration(median(result.seconds))}", flush=True)
        write("official", report, options, finished=False)
    del competitors, var
    release(device)
    for row in rows if not options.no_memory else []:
        row["memory"] = memory(options, (row["who"], row["precision"]), row["batch"])
        if row["who"] == "var_ext":
            row["released"] = memory(options, ("var_ext released", row["precision"]), row["batch"])
        write("official", report, options, finished=False)
    write("official", report, options, finished=True)


if __name__ == "__main__":
    main()
