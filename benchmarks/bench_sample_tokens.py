"""sample_tokens over the published vocabulary and settings, and over that of the digits model.

On CUDA one launch a call, and each logit moves once: the row stays in registers up to V = 16384. Counted, for an H100 SXM
with 3.35 TB/s, a row of 4096 with 900 and 0.96:

| 2048 rows | MB moved | roofline | steps in registers, at 4 instructions an element, 132 x 4 x 1.7 G/s |
| --- | --- | --- | --- |
| float32 | 33.6 | 10.0 us | 2048 x 4096 x (about 30 of selection + 60 of loads and weights) / 32: 26 us |
| bfloat16 | 16.8 | 5.0 us | the same |
| float32, guided | 67.1 | 20.0 us | the same and 6 more an element |
| bfloat16, guided | 33.6 | 10.0 us | |

Instructions bound it, not memory. Not measured yet. Rows beyond 16384 are read again for each of some 30 steps, mostly from
the L2 cache.
"""

from __future__ import annotations

from functools import partial

import torch
from contest import Contest, nbytes, same
from torch import Tensor

from var_ext import ops, reference
from var_ext.reference.sample_tokens import keep_top

PUBLISHED = dict(batch=8, length=256, vocabulary=4096, top_k=900, top_p=0.96)
DIGITS = dict(batch=20, length=36, vocabulary=256, cfg=1.5)
SHAPES = {
    "2048 x 4096, top_k 900, top_p 0.96": dict(**PUBLISHED, cfg=None),
    "2048 x 4096, top_k 900, top_p 0.96, bf16": dict(**PUBLISHED, cfg=None, dtype=torch.bfloat16),
    "2048 x 4096, guided, top_k 900, top_p 0.96": dict(**PUBLISHED, cfg=1.5),
    "2048 x 4096, guided, top_k 900, top_p 0.96, bf16": dict(**PUBLISHED, cfg=1.5, dtype=torch.bfloat16),
    "digits, 720 x 256, guided": dict(**DIGITS, top_k=0, top_p=0.0),
    "digits, 720 x 256, guided, top_k 64, top_p 0.96": dict(**DIGITS, top_k=64, top_p=0.96),
}
SMOKE = dict(
    batch=2, length=64, vocabulary=33, cfg=1.5, top_k=8, top_p=0.96
)  # draws enough that argmax shows
COMPETITORS = ("var_ext", "reference", "topk + sort + multinomial")
LAPS = 3  # slow enough to be steady


def guided(logits: Tensor, cfg: float | None) -> Tensor:
    if cfg is None:
        return logits
    cond, uncond = logits.chunk(2)
    return (1 + cfg) * cond - cfg * uncond


def published(logits: Tensor, cfg: float | None, top_k: int, top_p: float) -> Tensor:
    """The filters as published, and the draw from torch's generator."""
    logits = guided(logits.float(), cfg)  # (B, L, V)
    if top_k > 0:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1).flatten(0, 1), 1).view(logits.shape[:2])


def allowed(kept: Tensor, result: Tensor, expected: Tensor) -> None:
    """A draw from another random stream: each token must be one that the filters keep."""
    assert result.shape == expected.shape
    assert kept.gather(-1, result[..., None]).isfinite().all()


def contest(
    batch: int,
    length: int,
    vocabulary: int,
    cfg: float | None,
    top_k: int,
    top_p: float,
    dtype: torch.dtype = torch.float32,
) -> Contest:
    logits = (torch.randn(batch * (1 if cfg is None else 2), length, vocabulary) * 3).to(dtype)
    seeds = torch.arange(batch)
    filters = dict(cfg=cfg, top_k=top_k, top_p=top_p)
    kept = keep_top(guided(logits.float(), cfg), top_k, top_p)
    return Contest(
        {
            "var_ext": lambda: ops.sample_tokens(logits, seeds, scale_index=9, **filters),
            "reference": lambda: reference.sample_tokens(logits, seeds, scale_index=9, **filters),
            "topk + sort + multinomial": partial(published, logits, **filters),
        },
        bytes=nbytes(logits) + batch * length * 8,
        check=same,
        checks={"topk + sort + multinomial": partial(allowed, kept)},
    )


def test_sample_tokens(race) -> None:
    race()
