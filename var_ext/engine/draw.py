"""Draws the tokens of a scale from its logits: one random stream per image, or the published one per batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from var_ext import ops
from var_ext.engine.layers import on_gpu
from var_ext.engine.options import Options
from var_ext.reference.sample_tokens import keep_top, philox4x32

Guidance = float | Tensor | None
Randomness = (
    Tensor | torch.Generator | None
)  # seeds (B,), or a generator for the batch; None: torch's global one
Edit = Callable[[Tensor, int], Tensor]  # codes (B, l, Cvae) and scale index -> codes


class Draw(Protocol):
    """Draws scale after scale; `tokens` gathers what was drawn, (B, p_k^2) int64 each."""

    tokens: list[Tensor]

    def __call__(self, logits: Tensor, k: int, cfg: Guidance) -> Tensor:
        """Codes (B, l, Cvae) of scale k from logits (B, l, V), or with cfg (2B, l, V), conditional half first."""
        ...


class Table(Protocol):
    """Values for every scale and image on the device, (K, B) each."""

    top_k: Tensor
    top_p: Tensor


def smooth_temperature(ratio: float) -> float:
    """Temperature of the Gumbel-softmax of `more_smooth`, at ratio = k / (K - 1)."""
    return max(0.27 * (1 - 0.95 * ratio), 0.005)


def _shares(logits: Tensor, gumbel: Tensor, ratio: float) -> Tensor:
    """Shares of the codes in a mixture, a Gumbel-softmax: (B, l, V) -> (B, l, V)."""
    return ((logits * (1 + ratio) + gumbel) / smooth_temperature(ratio)).softmax(dim=-1)


class SeededDraw:
    """One random stream per image: Philox keyed by its seed, with scale and position as counter.

    Args:
        seeds: (B,) int64.
        options: their values may be in `table` instead, where a captured graph reads them.
        codebook: (V, Cvae) float32.
        table: `top_k` and `top_p` on the device, (K, B) each.
    """

    def __init__(self, seeds: Tensor, options: Options, codebook: Tensor, table: Table | None = None) -> None:
        self.seeds, self.options, self.codebook, self.table = seeds, options, codebook, table
        self.tokens: list[Tensor] = []

    def __call__(self, logits: Tensor, k: int, cfg: Guidance) -> Tensor:
        options, heat = self.options, self.options.temperature[k]
        top_k: int | Tensor = self.table.top_k[k] if self.table else options.top_k[k]
        top_p: float | Tensor = self.table.top_p[k] if self.table else options.top_p[k]
        if heat != 1:
            logits = logits.float() / heat
        self.tokens.append(
            ops.sample_tokens(logits, self.seeds, scale_index=k, cfg=cfg, top_k=top_k, top_p=top_p)
        )
        if not options.more_smooth:
            return look_up(self.codebook, self.tokens[-1])
        logits = keep_top(guided_logits(logits.float(), cfg), options.top_k[k], options.top_p[k])
        noise = gumbel_noise(self.seeds, k, *logits.shape[1:])
        shares = _shares(logits, noise, options.schedule.ratio(k))
        if on_gpu(shares):
            return shares @ self.codebook
        # one matmul an image: with more rows it could sum in another order
        return torch.stack([of_image @ self.codebook for of_image in shares])


def guided_logits(logits: Tensor, cfg: Guidance) -> Tensor:
    """(1 + cfg) cond - cfg uncond of the two halves (2B, l, V), or without cfg the logits (B, l, V) themselves."""
    if cfg is None:
        return logits
    cond, uncond = logits.chunk(2)
    if isinstance(cfg, Tensor):  # in float64 until the multiplication, like Python floats
        t = cfg[:, None, None].double()
        return (1 + t).float() * cond - t.float() * uncond
    return (1 + cfg) * cond - cfg * uncond


def gumbel_noise(seeds: Tensor, k: int, positions: int, codes: int) -> Tensor:
    """Gumbel noise (B, positions, codes) float32, a pure function of (seed, scale, position, code).

    The fourth word of the counter separates it from the numbers that draw tokens.
    """
    position = torch.arange(positions, device=seeds.device)[:, None]
    quad = torch.arange(-(-codes // 4), device=seeds.device)
    low = 0xFFFFFFFF
    key = ((seeds & low)[:, None, None], (seeds >> 32 & low)[:, None, None])
    words = torch.stack(philox4x32((position, k, quad, 1), key), dim=-1)  # (B, positions, codes / 4, 4)
    uniform = (words.flatten(2)[..., :codes].double() + 0.5) * 2.0**-32
    return -(-uniform.log()).log().float()


def look_up(codebook: Tensor, tokens: Tensor) -> Tensor:
    """Codes (..., Cvae) of tokens (...). A token of -1, drawn from NaN, gets an arbitrary code: a device assert
    would make the GPU unusable for the process. The caller checks the tokens afterwards."""
    return codebook[tokens]


def multinomial(probabilities: Tensor, rng: torch.Generator | None) -> Tensor:
    """What `torch.multinomial` draws, one of each row: (N, V) -> (N,) int64, -1 where a row is NaN.

    The same arithmetic (an exponential race) on the same random numbers, but no host sync: it can be captured, and a
    bad row raises no device assert.
    """
    race = torch.empty_like(probabilities).exponential_(generator=rng)
    drawn = torch.div(probabilities, race, out=race).argmax(dim=-1)
    return drawn.masked_fill_(probabilities[:, 0].isnan(), -1)  # a softmax is NaN everywhere or nowhere


class PublishedDraw:
    """The random stream of the published code: one generator for the whole batch, torch's own draws.

    Args:
        rng: None takes torch's global generator.
    """

    def __init__(self, rng: torch.Generator | None, options: Options, codebook: Tensor) -> None:
        self.rng, self.options, self.codebook = rng, options, codebook
        self.tokens: list[Tensor] = []

    def __call__(self, logits: Tensor, k: int, cfg: Guidance) -> Tensor:
        options = self.options
        logits = guided_logits(logits.float(), cfg) / options.temperature[k]
        logits = keep_top(logits, options.top_k[k], options.top_p[k])  # (B, l, V)
        probabilities = logits.softmax(dim=-1).flatten(0, 1)
        self.tokens.append(multinomial(probabilities, self.rng).view(logits.shape[:2]))
        if not options.more_smooth:
            return look_up(self.codebook, self.tokens[-1])
        gumbel = -torch.empty_like(logits).exponential_(generator=self.rng).log()
        return _shares(logits, gumbel, options.schedule.ratio(k)) @ self.codebook


def draw_from(randomness: Randomness, options: Options, codebook: Tensor, table: Table | None = None) -> Draw:
    """`SeededDraw` for seeds, the published draw for a generator; `table` as in `SeededDraw`."""
    if isinstance(randomness, Tensor):
        return SeededDraw(randomness, options, codebook, table)
    return PublishedDraw(randomness, options, codebook)


def reads_table(randomness: Randomness, options: Options) -> frozenset[str]:
    """The options that are read from tables on the device; their values in `Options` are not used."""
    if isinstance(randomness, Tensor) and not options.more_smooth:
        return frozenset(("cfg", "top_k", "top_p"))
    return frozenset(("cfg",))
