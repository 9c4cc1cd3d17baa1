"""Features of Inception, images a second a core: torch-fidelity's network and ours, with the same random weights.

    python benchmarks/vs_torch_fidelity.py --checkout DIR    # of github.com/toshas/torch-fidelity
    python benchmarks/vs_torch_fidelity.py --batch 2 --laps 1 --compared 0    # ours alone, a minute on a CPU

All are timed in turns in one process on one thread, resize included, on random pictures in memory. Ours gives sFID's
features too. Features are compared first; what bfloat16 changes is said as the largest difference of a feature relative
to the largest feature, and in a Fréchet distance between two sets of pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import MagicMock

import torch
from harness.clock import clock_of, in_turn
from harness.report import facts
from torch import Tensor, nn

from var_ext.evaluation.frechet import frechet_distance
from var_ext.evaluation.inception import InceptionV3

Call = Callable[[Tensor], Tensor]  # pixels (B, 3, S, S) uint8 -> pool (B, 2048)


def random_weights(network: InceptionV3) -> None:
    """Weights that keep a signal's size through the network."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)


def published(checkout: Path, network: InceptionV3) -> Call:
    """torch-fidelity's, with these weights; torchvision, which it imports elsewhere, is a stand-in."""
    names = (
        "torchvision",
        "torchvision.datasets",
        "torchvision.transforms",
        "torchvision.transforms.functional",
    )
    sys.modules.update({name: MagicMock() for name in names})
    sys.path.append(str(checkout))
    from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-not-found]
        FeatureExtractorInceptionV3,
    )

    with tempfile.TemporaryDirectory() as folder:
        torch.save(network.state_dict(), f"{folder}/weights.pth")
        theirs = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=f"{folder}/weights.pth"
        )
    return lambda pixels: theirs(pixels)[0]


def deviation(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


def frechet(call: Call, count: int, side: int, batch: int) -> float:
    """Between pictures of two kinds, the same for every call."""
    generator = torch.Generator().manual_seed(0)
    sets = []
    for contrast in (60, 90):
        noise = torch.randn(count, 3, side, side, generator=generator)
        smooth = nn.functional.avg_pool2d(noise, 9, 1, 4) * 5 + noise
        pixels = (smooth * contrast / 2 + 128).clamp(0, 255).to(torch.uint8)
        sets.append(torch.cat([call(part) for part in pixels.split(batch)]))
    return frechet_distance(*sets)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkout", type=Path, help="folder of torch-fidelity's code")
    add("--batch", type=int, default=8)
    add("--side", type=int, default=256)
    add("--laps", type=int, default=5)
    add("--compared", type=int, default=48, help="pictures of the Fréchet distance; 0 leaves it out")
    add("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = InceptionV3()
    random_weights(network)
    fp32, bf16 = network.folded(), network.folded(torch.bfloat16)
    calls: dict[str, Call] = {"ours fp32": lambda x: fp32(x)[0], "ours bf16": lambda x: bf16(x)[0]}
    if options.checkout:
        calls = {"torch-fidelity fp32": published(options.checkout, network), **calls}
    pixels = torch.randint(0, 256, (options.batch, 3, options.side, options.side), dtype=torch.uint8)
    expected = network(pixels)[0]
    off = {name: deviation(call(pixels), expected) for name, call in calls.items()}
    for name, limit in (("torch-fidelity fp32", 1e-5), ("ours fp32", 1e-5), ("ours bf16", 0.05)):
        if off.get(name, 0) > limit:
            raise SystemExit(f"{name} is {off[name]:.1e} off, not timed")
    timed = in_turn(
        {name: (lambda _, call=call: call(pixels)) for name, call in calls.items()},
        options.laps,
        clock_of(torch.device("cpu")),
    )
    rows: list[dict[str, Any]] = []
    base = median(next(iter(timed.values())).seconds)
    print(f"{options.side} px, batches of {options.batch}, one thread, {options.laps} laps in turns\n")
    print(f"| network | images/s | of {next(iter(timed))} | feature off by |")
    print("| --- | --- | --- | --- |")
    for name, result in timed.items():
        seconds = median(result.seconds)
        rows.append(dict(who=name, seconds=result.seconds, deviation=off[name]))
        print(f"| {name} | {options.batch / seconds:.2f} | {base / seconds:.2f} x | {off[name]:.1e} |")
    if options.compared:
        found = {
            name: frechet(call, options.compared, options.side, options.batch) for name, call in calls.items()
        }
        print(f"\nFréchet distance of {options.compared} and {options.compared} pictures:")
        for row, (name, value) in zip(rows, found.items(), strict=True):
            row["frechet"] = value
            print(f"{name}: {value:.6f} ({100 * (value / next(iter(found.values())) - 1):+.4f} %)")
    if options.json:
        report = dict(about=facts(torch.device("cpu")), batch=options.batch, side=options.side, rows=rows)
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
