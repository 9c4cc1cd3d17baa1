"""The cost of var_ext sampling over batch and depth, with counted FLOPs.

    python benchmarks/cost.py                                  # batch 1 to 32 at depth 16, depth 2 to 16 at batch 1
    python benchmarks/cost.py --tiny --laps 1 --batch-sizes 1,2 --depths 1,2 --json /tmp/tiny.json    # seconds on a CPU

Random weights, 256 px, guidance on, decoder included. The FLOPs are those of benchmarks/flops.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flops
from harness.clock import in_turn
from harness.comparison import Comparison, chosen, numbers, parser_of
from harness.report import facts
from samplers import DTYPES, PRECISIONS, TINY, drawer, drawn, our_model


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
    parser = parser_of(__doc__, laps=2, batch_sizes=[1, 2, 4, 8, 16, 32], memory=False)
    parser.add_argument("--depths", type=numbers, default=[2, 4, 8, 12, 16], help="at the first batch size")
    parser.set_defaults(precisions=["bf16"])
    options = chosen(parser, PRECISIONS)
    device, model = options.device, dict(depth=options.depth, tiny=options.tiny)
    comparison = Comparison("cost", __file__, options, about=facts(device), model=model)
    for depth, batches in points(options.batch_sizes, options.depth, options.depths):
        var = our_model(depth, device, options.tiny)
        for precision in options.precisions:
            draw, cost = drawer(var, precision), counted(depth, precision, options.tiny)
            for batch in batches:
                call = partial(drawn, draw, batch, device)
                timed = in_turn({"var_ext": lambda _, call=call: call()}, options.laps, comparison.clock)
                comparison.add(timed["var_ext"], depth=depth, batch=batch, precision=precision, flops=cost)
            del draw, call
        del var
        comparison.clock.release()
    comparison.save(finished=True)


if __name__ == "__main__":
    main()
