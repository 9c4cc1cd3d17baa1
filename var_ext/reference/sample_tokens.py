"""Reference of `sample_tokens`, and the counter-based random numbers behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Tensor | int, ...], key: tuple[Tensor | int, Tensor | int]
) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words, held in int64, for each counter and key.

    Args:
        counter: four words in [0, 2^32), tensors that broadcast together.
        key: two words, likewise.
    """
    c0, c1, c2, c3 = (torch.as_tensor(c) for c in counter)
    k0, k1 = key
    for _ in range(10):
        # a 32 x 32 bit product overflows int64, so each is taken in two halves of 16 bits
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    low = a * (b & 0xFFFF)  # < 2^48
    upper = a * (b >> 16) + (low >> 16)  # < 2^49: the product without its lowest 16 bits
    return upper >> 16, ((upper & 0xFFFF) << 16) | (low & 0xFFFF)


def uniform(seeds: Tensor, scale_index: int, positions: int) -> Tensor:
    """One number in (0, 1) for each (image, position), (B, positions) float64, a pure function of its key."""
    position = torch.arange(positions, device=seeds.device)[None, :]  # (1, L)
    key = ((seeds & _LOW)[:, None], ((seeds >> 32) & _LOW)[:, None])
    word = philox4x32((position, scale_index, 0, 0), key)[0]  # (B, L)
    return (word.double() + 0.5) * 2.0**-32


def keep_top(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to -inf what top-k and top-p drop; ties with the last kept logit are kept. (..., V) -> (..., V)."""
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p > 0:
        probabilities = logits.softmax(dim=-1)
        ascending = probabilities.sort(dim=-1).values
        kept = ascending.cumsum(dim=-1) > 1 - top_p
        kept[..., -1] = True  # the largest always stays
        lowest = ascending.gather(-1, kept.byte().argmax(dim=-1, keepdim=True))
        logits = logits.masked_fill(probabilities < lowest, -torch.inf)
    return logits


def sample_tokens(
    logits: Tensor,  # (B, L, V), or (2B, L, V) with guidance
    seeds: Tensor,  # (B,)
    *,
    scale_index: int,
    cfg: float | Tensor | None = None,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 0.0,
) -> Tensor:
    """Guidance, top-k, top-p, then one draw per position by inverting the distribution function: (B, L)."""
    if any(isinstance(value, Tensor) for value in (cfg, top_k, top_p)):
        return _image_by_image(logits, seeds, scale_index, cfg, top_k, top_p)
    assert not isinstance(top_k, Tensor) and not isinstance(top_p, Tensor)
    logits = logits.float()
    if cfg is not None:
        cond, uncond = logits.chunk(2)
        masked = cond == -torch.inf  # stays so, whatever the other half
        logits = ((1 + cfg) * cond - cfg * uncond).masked_fill(masked, -torch.inf)  # (B, L, V)
    # a row of only -inf has no distribution either: its softmax is NaN
    largest = logits.amax(dim=-1, keepdim=True)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError(
            "sample_tokens: each row of logits needs a finite maximum and no NaN, got a row without"
        )
    cumulative = keep_top(logits, top_k, top_p).softmax(dim=-1).double().cumsum(dim=-1)  # (B, L, V)
    target = uniform(seeds, scale_index, logits.shape[1])[..., None] * cumulative[..., -1:]  # (B, L, 1)
    # the first code whose cumulative probability exceeds the target: never one of probability zero
    return torch.searchsorted(cumulative, target, right=True)[..., 0]


def _image_by_image(
    logits: Tensor,
    seeds: Tensor,
    scale_index: int,
    cfg: float | Tensor | None,
    top_k: int | Tensor,
    top_p: float | Tensor,
) -> Tensor:
    """Values in tensors, () or (B,)."""

    def of_each(value: Any) -> list[Any]:
        return value.expand(len(seeds)).tolist() if isinstance(value, Tensor) else [value] * len(seeds)

    tokens = torch.empty(len(seeds), logits.shape[1], dtype=torch.int64, device=seeds.device)
    for i, (own_cfg, own_k, own_p) in enumerate(zip(*map(of_each, (cfg, top_k, top_p)), strict=True)):
        if own_k < 0 or not 0 <= own_p <= 1:
            raise ValueError(
                "sample_tokens: each top_k must be 0 or more and each top_p in [0, 1], "
                f"got {own_k} and {own_p}"
            )
        own = logits[i :: len(seeds)]  # (1, L, V), with guidance both halves
        drawn = sample_tokens(
            own, seeds[i : i + 1], scale_index=scale_index, cfg=own_cfg, top_k=own_k, top_p=own_p
        )
        tokens[i] = drawn[0]
    return tokens
