"""From logits to tokens: guidance, top-k, top-p, one draw per position."""

from __future__ import annotations

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import FLOATS, check_dtype, check_shape, check_together, require
from var_ext.ops._native import kernels, view
from var_ext.ops._registry import implement


def _native(
    logits: Tensor,
    seeds: Tensor,
    scale_index: int,
    cfg: float | None,
    top_k: int,
    top_p: float,
    cfgs: Tensor | None = None,
    top_ks: Tensor | None = None,
    top_ps: Tensor | None = None,
) -> Tensor:
    if logits.dtype == torch.float64:
        logits = logits.float()
    out = _fake(logits, seeds)
    kernels(logits).sample_tokens(
        view(logits), view(seeds), view(out), scale_index,
        cfg if cfgs is None else view(cfgs),
        top_k if top_ks is None else view(top_ks),
        top_p if top_ps is None else view(top_ps),
    )  # fmt: skip
    return out


def _fake(logits: Tensor, seeds: Tensor, *_: object) -> Tensor:
    return seeds.new_empty(seeds.shape[0], logits.shape[1])


def _fallback(
    logits: Tensor,
    seeds: Tensor,
    scale_index: int,
    cfg: float | None,
    top_k: int,
    top_p: float,
    cfgs: Tensor | None = None,
    top_ks: Tensor | None = None,
    top_ps: Tensor | None = None,
) -> Tensor:
    return reference.sample_tokens(
        logits,
        seeds,
        scale_index=scale_index,
        cfg=cfg if cfgs is None else cfgs,
        top_k=top_k if top_ks is None else top_ks,
        top_p=top_p if top_ps is None else top_ps,
    )


# cfgs, top_ks, top_ps: (B,) each, replace the single values before them
implement(
    "sample_tokens",
    "sample_tokens(Tensor logits, Tensor seeds, int scale_index, float? cfg, int top_k, float top_p, "
    "Tensor? cfgs=None, Tensor? top_ks=None, Tensor? top_ps=None) -> Tensor",
    native=_native,
    fallback=_fallback,
    fake=_fake,
)


def _each(name: str, value: Tensor, seeds: Tensor, dtype: torch.dtype) -> Tensor:
    """A value for each image, (B,), from a tensor () or (B,)."""
    op, size = "sample_tokens", seeds.shape[0]
    require(
        value.shape in ((), (size,)),
        op,
        f"{name} must be a number or a tensor () or ({size},)",
        tuple(value.shape),
    )
    check_dtype(op, name, value, (torch.int64,) if dtype == torch.int64 else FLOATS)
    check_together(op, same_dtype=False, seeds=seeds, **{name: value})
    return value.detach().to(dtype).expand(size)


def sample_tokens(
    logits: Tensor,
    seeds: Tensor,
    *,
    scale_index: int,
    cfg: float | Tensor | None = None,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 0.0,
) -> Tensor:
    """Draw one token per position, each image from its own random stream (paper, section 3.2 and appendix).

    The number drawn for a position is Philox4x32-10 keyed by the image's seed, counted by (position, scale): an image
    does not depend on its batch, its place in it, or the device.

    cfg, top_k and top_p are one value for all images, or a tensor on the device of the seeds, () or (B,): a captured
    CUDA graph rereads it at each replay. Floats are used in float64 there; of another dtype, they are converted.

    Args:
        logits: (B, L, V); with guidance (2B, L, V), first the conditional then the unconditional half. Any float dtype;
            computed in float32.
        seeds: (B,) int64, one per image.
        scale_index: which scale of the schedule this is, 0 or more.
        cfg: guidance t: (1 + t) cond - t uncond, and -inf where cond is. None: no unconditional half is given.
        top_k: keep this many largest logits (more at ties with the last of them); 0 keeps all.
        top_p: of those, drop the smallest whose ascending cumulative probability is <= 1 - top_p, never the largest.
            Equally probable ones are dropped together or not at all (a sort would drop some); 0 drops none.

    Returns:
        (B, L) int64.

    Raises:
        ValueError: shapes do not match, top_k or top_p is out of range, tensors lie on different devices, or a row has
            NaN or no finite logit. On CUDA there is no host sync to check for this: the token of such a row
            is -1, and so are those of an image with top_k or top_p out of range in a tensor.
        TypeError: logits are not floats or seeds not int64, or a tensor of cfg or top_p is not of floats, of top_k not
            int64.
    """
    op = "sample_tokens"
    check_shape(op, "seeds", seeds, "(B,)", None)
    check_dtype(op, "seeds", seeds, (torch.int64,))
    halves = "(B, L, V)" if cfg is None else "(2B, L, V)"
    check_shape(op, "logits", logits, halves, seeds.shape[0] * (1 if cfg is None else 2), None, None)
    check_dtype(op, "logits", logits, FLOATS)
    require(logits.shape[2] > 0, op, "logits must have V of at least 1", tuple(logits.shape))
    require(scale_index >= 0, op, "scale_index must be 0 or more", scale_index)
    cfgs = top_ks = top_ps = None
    if isinstance(cfg, Tensor):
        cfgs, cfg = _each("cfg", cfg, seeds, torch.float64), 0.0
    if isinstance(top_k, Tensor):
        top_ks, top_k = _each("top_k", top_k, seeds, torch.int64), 0
    if isinstance(top_p, Tensor):
        top_ps, top_p = _each("top_p", top_p, seeds, torch.float64), 0.0
    require(top_k >= 0, op, "top_k must be 0 or more", top_k)
    require(0.0 <= top_p <= 1.0, op, "top_p must be in [0, 1]", top_p)
    check_together(op, same_dtype=False, logits=logits, seeds=seeds)
    logits = logits.detach()
    if backend.current() == "reference":
        return _fallback(logits, seeds, scale_index, cfg, top_k, top_p, cfgs, top_ks, top_ps)
    if cfgs is None and top_ks is None and top_ps is None:
        return torch.ops.var_ext.sample_tokens.default(logits, seeds, scale_index, cfg, top_k, top_p)
    return torch.ops.var_ext.sample_tokens.default(
        logits, seeds, scale_index, cfg, top_k, top_p, cfgs, top_ks, top_ps
    )
