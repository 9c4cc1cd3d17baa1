"""Where sampling time goes, and how much accuracy a precision costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

from var_ext.engine import Call, Draw, Engine, SeededDraw, named_precision
from var_ext.engine.draw import Guidance, guided_logits
from var_ext.sampling import Sampler


@dataclass(frozen=True)
class Timing:
    """Median wall-clock seconds of drawing a batch once.

    On a GPU the total is timed with the captured graph, the parts without it. `scales[k]` is transformer and head at
    scale k; `draws` guidance and drawing, `steps` the quantizer's residual steps.
    """

    batch: int
    precision: str
    total: float
    sides: tuple[int, ...]
    scales: tuple[float, ...]
    draws: tuple[float, ...]
    steps: tuple[float, ...]
    decoder: float

    @property
    def images_per_second(self) -> float:
        """End to end, from labels and seeds to pixels."""
        return self.batch / self.total

    def parts(self) -> dict[str, float]:
        """Name of each part -> seconds."""
        scales = {
            f"transformer, scale {side:>2} x {side}": seconds
            for side, seconds in zip(self.sides, self.scales, strict=True)
        }
        return scales | {
            "transformer, all scales": sum(self.scales),
            "drawing tokens": sum(self.draws),
            "residual steps": sum(self.steps),
            "decoder": self.decoder,
        }

    def as_text(self) -> str:
        """A table of the parts, in milliseconds and as a share of their sum."""
        whole = sum(self.scales) + sum(self.draws) + sum(self.steps) + self.decoder
        head = (
            f"batch {self.batch}, {self.precision}: {1e3 * self.total:.1f} ms end to end, "
            f"{self.images_per_second:.1f} images/s"
        )
        rows = [
            f"  {name:<28}{1e3 * s:>10.2f} ms {100 * s / whole:>5.1f}%" for name, s in self.parts().items()
        ]
        return "\n".join([head, *rows])


def measure(sampler: Sampler, batch: int, *, repeats: int = 5) -> Timing:
    """Times drawing `batch` images with the model's recommended settings, after one run to warm up.

    Args:
        sampler: the model, on any device.
        batch: images drawn at once; labels cycle through the classes.
        repeats: timed runs; each figure is their median.
    """
    device = sampler.device
    labels = torch.arange(batch, device=device) % sampler.num_classes  # (B,)
    seeds = torch.arange(batch, device=device)
    totals: list[float] = []
    parts: list[list[float]] = []
    for run in range(repeats + 1):
        start = _now(device)
        sampler(labels, seeds, batch_size=batch)
        total = _now(device) - start
        marks = _marks(sampler, labels, seeds)
        if run:  # the first run warms caches and thread pools
            totals.append(total)
            parts.append([after - before for before, after in pairwise(marks)])
    *medians, decoder = (median(column) for column in zip(*parts, strict=True))
    return Timing(
        batch=batch,
        precision=sampler.precision.name,
        total=median(totals),
        sides=sampler.vae.schedule.patch_nums,
        scales=tuple(medians[0::3]),
        draws=tuple(medians[1::3]),
        steps=tuple(medians[2::3]),
        decoder=decoder,
    )


@torch.inference_mode()
def _marks(sampler: Sampler, labels: Tensor, seeds: Tensor) -> list[float]:
    """Times at the ends of the parts: start, then of each scale its logits, tokens and residual step, then pixels."""
    options, engine = sampler.options(), sampler.engine
    call, marks = Call(labels, seeds, options), [_now(sampler.device)]
    draw = Watched(SeededDraw(seeds, options, engine.codebook), lambda: marks.append(_now(sampler.device)))
    f_hats = []
    for f_hat in engine.generate(call, draw):
        marks.append(_now(sampler.device))
        f_hats = [f_hat]
    engine.decode(*f_hats)
    marks.append(_now(sampler.device))
    return marks


class Watched:
    """A draw that reports when it begins and ends."""

    def __init__(self, draw: Draw, say: Callable[[], None]) -> None:
        self.draw, self.say, self.tokens = draw, say, draw.tokens

    def __call__(self, logits: Tensor, k: int, cfg: Guidance) -> Tensor:
        self.say()
        codes = self.draw(logits, k, cfg)
        self.say()
        return codes


@dataclass(frozen=True)
class Deviation:
    """Deviation of a precision from fp32, on the same tokens (teacher forcing).

    `logits` is the root mean square error of logits over their deviation from their mean; `tokens` the share of equal
    draws for the same random numbers; `psnr` of images decoded from the same tokens, in dB; `pictures` of complete
    sampling runs, whose tokens may differ.
    """

    precision: str
    logits: float
    tokens: float
    psnr: float
    pictures: float

    def as_text(self) -> str:
        """One line."""
        return (
            f"{self.precision}: logits off by {100 * self.logits:.2f}% of their deviation, "
            f"{100 * self.tokens:.1f}% of tokens equal, images of the same tokens {self.psnr:.1f} dB, "
            f"drawn alone {self.pictures:.1f} dB"
        )


@torch.inference_mode()
def deviation(sampler: Sampler, precision: str, *, images: int = 8) -> Deviation:
    """Draws `images` in fp32, then has `precision` predict and decode the same tokens.

    Raises:
        ValueError: the device does not support the precision, or the sampler has released its models' weights.
    """
    if sampler.engine.release:
        raise ValueError("a sampler that releases weights cannot be compared: fp32 needs them")
    device, options = sampler.device, sampler.options()
    labels = torch.arange(images, device=device) % sampler.num_classes
    seeds = torch.arange(images, device=device)
    call, codebook = Call(labels, seeds, options), sampler.engine.codebook
    exact, other = (
        sampler.engine
        if name == sampler.precision.name  # its weights are packed already
        else Engine(sampler.var, named_precision(name, device), pack=True)
        for name in ("fp32", precision)
    )
    forced = _Forced(SeededDraw(seeds, options, codebook), None)
    pictures, tokens = exact.sample(call, forced)
    again = _Forced(SeededDraw(seeds, options, codebook), tokens)
    decoded, drawn = other.sample(call, again)
    logits = torch.cat(forced.logits, dim=1)
    error = torch.cat(again.logits, dim=1) - logits
    spread = (logits - logits.mean(dim=-1, keepdim=True)).square().mean().sqrt()
    whole, _ = other.sample(call, SeededDraw(seeds, options, codebook))
    return Deviation(
        precision,
        float(error.square().mean().sqrt() / spread),
        float((drawn == tokens).double().mean()),
        psnr(decoded, pictures),
        psnr(whole, pictures),
    )


class _Forced:
    """Draws as `inner` does, but returns the codes of `tokens`; keeps guided logits (B, l, V)."""

    def __init__(self, inner: SeededDraw, tokens: Tensor | None) -> None:
        self.inner, self.forced, self.tokens = inner, tokens, inner.tokens
        self.logits: list[Tensor] = []

    def __call__(self, logits: Tensor, k: int, cfg: float | Tensor | None) -> Tensor:
        codes = self.inner(logits, k, cfg)
        logits = guided_logits(logits.float(), cfg)
        self.logits.append(logits)
        if self.forced is None:
            return codes
        before = sum(part.shape[1] for part in self.tokens[:-1])
        return torch.nn.functional.embedding(
            self.forced[:, before : before + logits.shape[1]], self.inner.codebook
        )


def psnr(images: Tensor, exact: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]; infinite if equal."""
    error = float((images - exact).square().mean())
    return 10 * math.log10(1 / error) if error else math.inf


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
