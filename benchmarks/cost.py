"""The cost of var_ext sampling over batch and depth, with counted FLOPs.

    python benchmarks/cost.py                                  # batch 1 to 32 at depth 16, depth 2 to 16 at batch 1
    python benchmarks/cost.py --tiny --laps 1 --batch-sizes 1,2 --depths 1,2 --json /tmp/tiny.json    # seconds on a CPU

Random weights, 256 px, guidance on, decoder included. The FLOPs are those of benchmarks/flops.py.
"""

from __future__ import annotations

import argparse
import functools
from statistics import median
from typing import Any

import flops
import torch
from samplers import DTYPES, TINY, drawer, drawn, our_model
from tables import duration
from versus import about, add_file_options, numbers, release, time_in_turn, words, write


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-sizes", type=numbers, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--depth", type=int, default=16, help="of the sweep over batches")
    parser.add_argument("--depths", type=numbers, default=[2, 4, 8, 12, 16], help="at the first batch size")
    parser.add_argument("--precisions", type=words, default=["bf16"])
    parser.add_argument("--laps", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--tiny", action="store_true", help="a toy tokenizer and four scales")
    add_file_options(parser)
    return parser.parse_args()


def counted(depth: int, precision: str, tiny: bool) -> dict[str, int]:
    """FLOPs of one image."""
    size: dict[str, Any] = dict(mixed=precision in DTYPES or precision == "int8")
    if tiny:
        widths = [TINY["ch"] * m for m in (1, 1, 2, 2, 4)]
        size |= dict(patch_nums=TINY["patch_nums"], codes=TINY["V"], channels=TINY["Cvae"], widths=widths)
    cost = flops.sampling(depth, **size)
    return dict(transformer=cost.transformer, decoder=cost.decoder)


def points(batches: list[int], depth: int, depths: list[int]) -> list[tuple[int, list[int]]]:
    """(depth, batch sizes), each pair once."""
    plan: dict[int, list[int]] = {d: [batches[0]] for d in depths}
    plan[depth] = batches
    return sorted(plan.items())


def main() -> None:
    options = arguments()
    device = options.device
    rows: list[dict[str, Any]] = []
    model = dict(depth=options.depth, tiny=options.tiny)
    report = dict(about=about(device), model=model, laps=options.laps, rows=rows)
    for depth, batches in points(options.batch_sizes, options.depth, options.depths):
        var = our_model(depth, device, options.tiny)
        for precision in options.precisions:
            draw = drawer(var, precision)
            for batch in batches:
                call = functools.partial(drawn, draw, batch, device)
                result = time_in_turn({"var_ext": lambda _, call=call: call()}, options.laps, device)[
                    "var_ext"
                ]
                cost = counted(depth, precision, options.tiny)
                rows.append(
                    dict(depth=depth, batch=batch, precision=precision, flops=cost, seconds=result.seconds)
                    | dict(error=result.error)
                )
                shown = duration(median(result.seconds)) if result.seconds else result.error
                print(f"depth {depth}, batch {batch}, {precision}: {shown}", flush=True)
                write("cost", report, options, finished=False)
            del draw, call
        del var
        release(device)
    write("cost", report, options, finished=True)


if __name__ == "__main__":
    main()
