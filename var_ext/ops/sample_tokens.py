"""From logits to tokens: guidance, top-k, top-p, one draw a position."""

from __future__ import annotations

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import FLOATS, check_dtype, check_shape, check_together, require
from var_ext.ops._native import view
from var_ext.ops._registry import implement


def _native(
    logits: Tensor, seeds: Tensor, scale_index: int, cfg: float | None, top_k: int, top_p: float
) -> Tensor:
    from var_ext import _C

    if logits.dtype == torch.float64:
        logits = logits.float()
    out = _fake(logits, seeds)
    _C.sample_tokens(view(logits), view(seeds), view(out), scale_index, cfg, top_k, top_p)
    return out


def _fake(logits: Tensor, seeds: Tensor, *_: object) -> Tensor:
    return seeds.new_empty(seeds.shape[0], logits.shape[1])


def _fallback(
    logits: Tensor, seeds: Tensor, scale_index: int, cfg: float | None, top_k: int, top_p: float
) -> Tensor:
    return reference.sample_tokens(logits, seeds, scale_index=scale_index, cfg=cfg, top_k=top_k, top_p=top_p)


implement(
    "sample_tokens",
    "sample_tokens(Tensor logits, Tensor seeds, int scale_index, float? cfg, int top_k, float top_p) -> Tensor",
    native=_native,
    fallback=_fallback,
    fake=_fake,
)


def sample_tokens(
    logits: Tensor,
    seeds: Tensor,
    *,
    scale_index: int,
    cfg: float | None = None,
    top_k: int = 0,
    top_p: float = 0.0,
) -> Tensor:
    """Draw one token a position, each image from a random stream of its own (paper, section 3.2 and appendix).

    The number drawn for a position is Philox4x32-10 keyed by the image's seed, counted by (position, scale): an image
    does not depend on its batch, its place in it, or the device.

    Args:
        logits: (B, L, V); with guidance (2B, L, V), first the conditional then the unconditional half. Any float dtype;
            computed in float32.
        seeds: (B,) int64, one an image.
        scale_index: which scale of the schedule this is, 0 or more.
        cfg: guidance t: (1 + t) cond - t uncond, and -inf where cond is. None: no unconditional half is given.
        top_k: keep this many largest logits (more at ties with the last of them); 0 keeps all.
        top_p: of those, drop the smallest whose ascending cumulative probability is <= 1 - top_p, never the largest.
            Equally probable ones are dropped only all together (a sort would drop some of them); 0 drops none.

    Returns:
        (B, L) int64.

    Raises:
        ValueError: shapes do not match, top_k or top_p is out of range, tensors lie on different devices, or a row has
            NaN or no finite logit.
        TypeError: logits are not floats or seeds not int64.
    """
    op = "sample_tokens"
    check_shape(op, "seeds", seeds, "(B,)", None)
    check_dtype(op, "seeds", seeds, (torch.int64,))
    halves = "(B, L, V)" if cfg is None else "(2B, L, V)"
    check_shape(op, "logits", logits, halves, seeds.shape[0] * (1 if cfg is None else 2), None, None)
    check_dtype(op, "logits", logits, FLOATS)
    require(logits.shape[2] > 0, op, "logits must have V of at least 1", tuple(logits.shape))
    require(scale_index >= 0, op, "scale_index must be 0 or more", scale_index)
    require(top_k >= 0, op, "top_k must be 0 or more", top_k)
    require(0.0 <= top_p <= 1.0, op, "top_p must be in [0, 1]", top_p)
    check_together(op, same_dtype=False, logits=logits, seeds=seeds)
    logits = logits.detach()
    if backend.current() == "reference":
        return _fallback(logits, seeds, scale_index, cfg, top_k, top_p)
    return torch.ops.var_ext.sample_tokens.default(logits, seeds, scale_index, cfg, top_k, top_p)
