"""sample_tokens over the published vocabulary and settings, and over that of the digits model.

On CUDA: one launch a call. Each logit is read once, as rows up to 16384 stay in registers; 8 bytes a row are written.
For 2048 rows of 4096, with the time an H100 SXM needs at 3.35 TB/s:

| logits | MB moved | roofline |
| --- | --- | --- |
| float32 | 33.6 | 10 us |
| bfloat16, float16 | 16.8 | 5 us |
| float32, guided | 67.1 | 20 us |
| bfloat16, float16, guided | 33.6 | 10 us |

Instructions are the bound, not memory: with top_k 900 and top_p 0.96 a row of normal logits takes 8 steps for the one
and 14 for the other (7 and 25 in bfloat16, for its ties), each about 110 and 150 instructions a warp with the sum over
the block, and some 1400 in all for loads, weights and draw. Estimated 8 x 4400 a row, 4 a cycle in each of 132
multiprocessors: 80 us. Not measured. Longer rows are read again for each step, from the L2 cache.
"""

from __future__ import annotations

from functools import partial

import torch
from harness.case import Case, nbytes, same
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
GPU_SHAPES = {
    f"{batch * length} x 4096, guided, top_k 900, top_p 0.96, {dtype}": dict(
        batch=batch, length=length, vocabulary=4096, cfg=1.5, top_k=900, top_p=0.96, dtype=kind
    )
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    for batch, length in ((8, 1), (8, 256), (50, 256))
}
SMOKE = dict(
    batch=2, length=64, vocabulary=33, cfg=1.5, top_k=8, top_p=0.96
)  # draws enough that argmax shows


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


def case(
    batch: int,
    length: int,
    vocabulary: int,
    cfg: float | None,
    top_k: int,
    top_p: float,
    dtype: torch.dtype = torch.float32,
) -> Case:
    logits = (torch.randn(batch * (1 if cfg is None else 2), length, vocabulary) * 3).to(dtype)
    seeds = torch.arange(batch)
    filters = dict(cfg=cfg, top_k=top_k, top_p=top_p)
    kept = keep_top(guided(logits.float(), cfg), top_k, top_p)
    return Case(
        {
            "var_ext": lambda: ops.sample_tokens(logits, seeds, scale_index=9, **filters),
            "reference": lambda: reference.sample_tokens(logits, seeds, scale_index=9, **filters),
            "topk + sort + multinomial": partial(published, logits, **filters),
        },
        bytes=nbytes(logits) + batch * length * 8,
        launches=1,
        check=same,
        laps=3,  # slow enough to be steady
        checks={"topk + sort + multinomial": partial(allowed, kept)},
    )
