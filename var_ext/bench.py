"""Where the time of sampling goes: the whole call, the transformer by scale, drawing tokens, the decoder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

from var_ext import ops
from var_ext.sampling import Sampler


@dataclass(frozen=True)
class Timing:
    """Median wall-clock seconds of drawing a batch once.

    `scales[k]` is the transformer at scale k, with the residual step that makes its input; `last_step` is
    the residual step after the last scale.
    """

    batch: int
    total: float
    sides: tuple[int, ...]
    scales: tuple[float, ...]
    draws: tuple[float, ...]
    last_step: float
    decoder: float

    @property
    def images_per_second(self) -> float:
        """End to end, from labels and seeds to pixels."""
        return self.batch / self.total

    def as_text(self) -> str:
        """A table of the parts, in milliseconds and as a share of their sum."""
        parts = {
            f"transformer, scale {side:>2} x {side}": seconds
            for side, seconds in zip(self.sides, self.scales, strict=True)
        }
        parts["transformer, all scales"] = sum(self.scales)
        parts["guidance and drawing"] = sum(self.draws)
        parts["last residual step"] = self.last_step
        parts["decoder"] = self.decoder
        whole = sum(self.scales) + sum(self.draws) + self.last_step + self.decoder
        head = (
            f"batch {self.batch}: {1e3 * self.total:.1f} ms end to end, {self.images_per_second:.1f} images/s"
        )
        rows = [f"  {name:<28}{1e3 * s:>10.2f} ms {100 * s / whole:>5.1f}%" for name, s in parts.items()]
        return "\n".join([head, *rows])


def measure(sampler: Sampler, batch: int, *, repeats: int = 5) -> Timing:
    """Times drawing `batch` images with the model's recommended settings, after one run to warm up.

    Args:
        sampler: the model, on any device.
        batch: images drawn at once; labels go round the classes.
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
    medians = [median(column) for column in zip(*parts, strict=True)]
    count = len(sampler.vae.schedule)
    return Timing(
        batch=batch,
        total=median(totals),
        sides=sampler.vae.schedule.patch_nums,
        scales=tuple(medians[0 : 2 * count : 2]),
        draws=tuple(medians[1 : 2 * count : 2]),
        last_step=medians[2 * count],
        decoder=medians[2 * count + 1],
    )


@torch.no_grad()
def _marks(sampler: Sampler, labels: torch.Tensor, seeds: torch.Tensor) -> list[float]:
    """Times at the ends of the parts: start, each scale's logits and tokens in turn, f_hat, pixels."""
    options, schedule = sampler.defaults, sampler.vae.schedule
    marks = [_now(sampler.device)]

    def choose(logits: torch.Tensor, k: int) -> torch.Tensor:
        marks.append(_now(sampler.device))
        tokens = ops.sample_tokens(
            logits,
            seeds,
            scale_index=k,
            cfg=options["cfg"] * schedule.ratio(k),
            top_k=options["top_k"],
            top_p=options["top_p"],
        )  # (B, l)
        codes = sampler.vae.quantize.embedding(tokens)  # (B, l, C)
        marks.append(_now(sampler.device))
        return codes

    f_hat = sampler.var.generate(labels, choose)
    marks.append(_now(sampler.device))
    sampler.vae.fhat_to_img(f_hat)
    marks.append(_now(sampler.device))
    return marks


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
