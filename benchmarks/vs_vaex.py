"""A training step of the 256 px tokenizer: with and without critic and LPIPS, and beside the published trainer's model.

    python benchmarks/vs_vaex.py --official DIR       # DIR: a checkout of github.com/FoundationVision/vaex
    python benchmarks/vs_vaex.py --tiny --laps 1      # ours alone; toys, seconds on a CPU

A step is the forward and backward pass of a batch in memory, clipping, AdamW and the moving average, with the recipe
`paper` (0.2 L1 + 1 L2, dropout 0.05; the critic is PatchGAN with everything on, LPIPS has VGG16 with random weights).
Ours quantizes in ten scales, the published model in one. Of the published trainer the plain step is timed: its other
losses need torchvision and weights. All are timed in turns in one process; memory is the peak of a fresh process, torch
included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from harness.clock import clock_of, in_turn
from harness.memory import in_fresh_process, memory_of
from harness.report import facts
from samplers import contained
from torch import Tensor, nn
from torch.nn import functional as F

from var_ext.training import TokenizerRecipe
from var_ext.training.loop import Moment
from var_ext.training.losses.lpips import LPIPS
from var_ext.training.precision import autocast
from var_ext.training.tokenizer import TokenizerTask

# what is trained -> fields of the recipe
PLAIN = dict(weight_perceptual=0.0, weight_adversarial=0.0)
CRITIC = dict(weight_perceptual=0.0, adversarial_start=0.0, adversarial_warmup=0.0)
WHOLE = dict(weight_perceptual=1.0, adversarial_start=0.0, adversarial_warmup=0.0)
OURS: dict[str, dict[str, Any]] = {"plain": PLAIN, "critic": CRITIC, "critic and LPIPS": WHOLE}
TINY = dict(ch=32, patch_nums=(1, 2, 3), vocab_size=64)
MISSING = (
    "timm",
    "pytz",
    "torchvision",
    "tap",
)  # what the published code imports and the plain step does not use
Call = Callable[[], Any]


def images_of(folder: Path, side: int) -> None:
    """Two classes of two pictures, so that there is a data set to build a trainer on."""
    from PIL import Image

    for label in "ab":
        (folder / label).mkdir()
        for i in range(4):
            Image.new("RGB", (side, side), (60 * i, 90, 20)).save(folder / label / f"{i}.png")


def ours(what: str, options: argparse.Namespace, precision: str) -> Call:
    """A step of this package."""
    sizes = TINY if options.tiny else {}
    recipe = dataclasses.replace(
        TokenizerRecipe.paper(), batch_size=options.batch, autocast=precision, codebook_init=0, restart_every=0,
        workers=0, **OURS[what], **sizes,
    )  # fmt: skip
    hook = LPIPS("vgg16") if recipe.weight_perceptual else None
    with tempfile.TemporaryDirectory() as folder:
        images_of(Path(folder), recipe.image_size)
        task = TokenizerTask(folder, recipe, perceptual=hook, device=options.device)
    batch = torch.rand(options.batch, 3, recipe.image_size, recipe.image_size, device=options.device) * 2 - 1
    at = Moment(500, 1000, 0, False)
    return lambda: task.step(at, (batch, torch.zeros(options.batch)))


def published(options: argparse.Namespace, precision: str) -> Call:
    """The published trainer's plain step, on its own model."""
    stand_ins = {name: ModuleType(name) for name in MISSING if name not in sys.modules}
    package = ModuleType("models")  # its own __init__ imports the discriminator
    package.__path__ = [str(options.official / "models")]
    with contained(options.official):
        sys.modules.update(stand_ins, models=package)
        from models.vqvae import VQVAE  # type: ignore[import-not-found]

        vae: nn.Module = VQVAE(
            ch=32 if options.tiny else 160, dropout=0.05, vocab_size=64 if options.tiny else 4096
        )
    for name in stand_ins:
        del sys.modules[name]
    vae = vae.to(options.device).train()
    average = [p.detach().clone() for p in vae.parameters()]
    optimizer = torch.optim.AdamW(vae.parameters(), 3e-4, (0.5, 0.9), weight_decay=0.005, fused=True)
    side = 48 if options.tiny else 256
    x = torch.rand(options.batch, 3, side, side, device=options.device) * 2 - 1

    def step() -> Tensor:
        with autocast(options.device, precision):
            output, vq, _, _ = vae(x)
        loss = 0.2 * F.l1_loss(output, x) + F.mse_loss(output, x) + vq
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 10)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for mean, p in zip(average, vae.parameters(), strict=True):
                mean.lerp_(p, 1e-4)
        return loss.detach()

    return step


def call_of(who: str, options: argparse.Namespace, precision: str) -> Call:
    return published(options, precision) if who == "published, plain" else ours(who, options, precision)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--official", type=Path, help="folder of the published code")
    add("--batch", type=int, default=1)
    add("--laps", type=int, default=5)
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--tiny", action="store_true")
    add("--json", type=Path, help="write the figures to this file too")
    add("--memory-of", nargs=2, metavar=("WHO", "PRECISION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        who, precision = options.memory_of
        print(json.dumps(memory_of(call_of(who, options, precision), options.device)))
        return
    names = [*OURS, *(["published, plain"] if options.official else [])]
    rows, clock = [], clock_of(options.device)
    for precision in ("fp32", "bf16"):
        calls = {name: call_of(name, options, precision) for name in names}
        timed = in_turn(
            {name: (lambda _, call=call: call()) for name, call in calls.items()}, options.laps, clock
        )
        del calls
        for name, result in timed.items():
            passed = ["--batch", str(options.batch), "--device", str(options.device)]
            passed += ["--tiny"] if options.tiny else []
            passed += ["--official", str(options.official.resolve())] if options.official else []
            memory = in_fresh_process(__file__, [*passed, "--memory-of", name, precision])
            rows.append(
                dict(who=name, precision=precision, seconds=result.seconds, memory=memory, error=result.error)
            )
            shown = f"{median(result.seconds):.3f} s" if result.seconds else result.error
            peak = f"{memory['peak'] / 2**30:.2f} GB" if "peak" in memory else memory["error"]
            print(f"| {name} | {precision} | {shown} | {peak} |", flush=True)
    if options.json:
        report = dict(about=facts(options.device), batch=options.batch, tiny=options.tiny, rows=rows)
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
