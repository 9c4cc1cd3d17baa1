"""What scripts of the published code expect: its editing notebook, its trainer, its hub class.

Nothing in this package calls this module.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from var_ext import ops
from var_ext.reference.sample_tokens import keep_top


def sample_with_top_k_top_p_(
    logits_BlV: Tensor,
    top_k: int = 0,
    top_p: float = 0.0,
    rng: torch.Generator | None = None,
    num_samples: int = 1,
) -> Tensor:
    """Tokens (B, l, num_samples) int64 of logits (B, l, V); a negative number draws without replacement."""
    kept = keep_top(logits_BlV, top_k, top_p).softmax(dim=-1).flatten(0, 1)
    drawn = kept.multinomial(abs(num_samples), replacement=num_samples >= 0, generator=rng)
    return drawn.view(*logits_BlV.shape[:2], abs(num_samples))


def gumbel_softmax_with_rng(
    logits: Tensor,
    tau: float = 1,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    rng: torch.Generator | None = None,
) -> Tensor:
    """Gumbel-softmax at temperature `tau` from a generator; `hard`: one-hot, with the gradient of the soft one."""
    gumbel = -torch.empty_like(logits).exponential_(generator=rng).log()
    soft = ((logits + gumbel) / tau).softmax(dim)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
    return one_hot - soft.detach() + soft


class Growing:
    """Attention to all keys and values so far, which it caches: `kv_caching` of the published attention."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def __call__(
        self, qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor | None, scale: float
    ) -> Tensor:
        """(B, l, 3, H, D) -> (B, l, H, D)."""
        offset = 0 if self.k is None else self.k.shape[1]
        self.k, self.v = (_with_room_for(qkv, cache) for cache in (self.k, self.v))
        return ops.cached_attention(qkv, q_bias, v_bias, log_scale, self.k, self.v, offset, scale=scale)


def _with_room_for(qkv: Tensor, cache: Tensor | None) -> Tensor:
    """A longer cache (B, L + l, H, D) for qkv (B, l, 3, H, D): new memory, the last l entries uninitialised."""
    room = torch.empty_like(qkv[:, :, 0], memory_format=torch.contiguous_format)
    return room if cache is None else torch.cat((cache, room), dim=1)


class PublishedAttention:
    """`kv_caching` of a block's attention."""

    growing: Growing | None = None

    def kv_caching(self, enable: bool) -> None:
        """Start caching keys and values, from an empty cache, or stop."""
        self.growing = Growing() if enable else None


class PublishedBlock:
    """A call with the published keywords, scale by scale."""

    def published_call(self: Any, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | None) -> Tensor:
        """x (B, l, C) -> (B, l, C).

        Raises:
            ValueError: caching is off, or a mask is given: whole sequences go through `VAR.forward`.
        """
        if attn_bias is not None or self.attn.growing is None:
            raise ValueError(
                "a block called with x and cond_BD works scale by scale: call attn.kv_caching(True) first, and pass "
                "attn_bias=None; VAR.forward runs whole sequences"
            )
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        stream = self((x.to(dtype),), self.modulation(cond_BD, dtype), self.attn.growing)
        return stream.sum()


class PublishedVAR:
    """Attributes of the published class."""

    prog_si = -1  # set by the published trainer; here the input length determines the scales
    _rng: torch.Generator | None = None

    @property
    def patch_nums(self: Any) -> tuple[int, ...]:
        """Sides of the token maps."""
        return self.schedule.patch_nums

    @property
    def begin_ends(self: Any) -> list[tuple[int, int]]:
        """First token of each scale, and one past its last."""
        return list(pairwise(accumulate(self.schedule.lengths, initial=0)))

    @property
    def num_stages_minus_1(self: Any) -> int:
        """K - 1."""
        return len(self.schedule) - 1

    @property
    def D(self: Any) -> int:
        """Width of the condition."""
        return self.C

    @property
    def vae_quant_proxy(self: Any) -> tuple[Any]:
        """The quantizer, in a tuple."""
        return (self.vae_proxy[0].quantize,)

    @property
    def uniform_prob(self: Any) -> Tensor:
        """(1, num_classes) float32, uniform."""
        shape = (1, self.num_classes)
        return torch.full(shape, 1 / self.num_classes, dtype=torch.float32, device=self.pos_1LC.device)

    @property
    def rng(self: Any) -> torch.Generator:
        """A generator on the model's device."""
        if self._rng is None:
            self.__dict__["_rng"] = torch.Generator(self.pos_1LC.device)
        return self._rng

    @rng.setter
    def rng(self: Any, generator: torch.Generator) -> None:
        self.__dict__["_rng"] = generator

    @rng.deleter
    def rng(self: Any) -> None:
        self.__dict__.pop("_rng", None)
