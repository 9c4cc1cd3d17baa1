"""sample_tokens over the published vocabulary and settings; the published way is sort + multinomial."""

from __future__ import annotations

from functools import partial

import torch
from contest import Contest, nbytes, same
from torch import Tensor

from var_ext import ops, reference
from var_ext.reference.sample_tokens import keep_top

SHAPES = {
    "2048 x 4096, top_k 900, top_p 0.96": dict(batch=8, length=256, vocabulary=4096, cfg=None),
    "2048 x 4096, guided, top_k 900, top_p 0.96": dict(batch=8, length=256, vocabulary=4096, cfg=1.5),
}
SMOKE = dict(batch=2, length=64, vocabulary=33, cfg=1.5)  # enough draws that argmax shows
COMPETITORS = ("var_ext", "reference", "sort + multinomial")
LAPS = 3  # slow enough to be steady


def guided(logits: Tensor, cfg: float | None) -> Tensor:
    if cfg is None:
        return logits
    cond, uncond = logits.chunk(2)
    return (1 + cfg) * cond - cfg * uncond


def by_multinomial(logits: Tensor, cfg: float | None, top_k: int, top_p: float) -> Tensor:
    kept = keep_top(guided(logits, cfg), top_k, top_p)  # (B, L, V)
    return torch.multinomial(kept.softmax(dim=-1).flatten(0, 1), 1).view(kept.shape[:2])


def allowed(kept: Tensor, result: Tensor, expected: Tensor) -> None:
    """A draw from another random stream: each token must be one that the filters keep."""
    assert result.shape == expected.shape
    assert kept.gather(-1, result[..., None]).isfinite().all()


def contest(batch: int, length: int, vocabulary: int, cfg: float | None) -> Contest:
    logits = torch.randn(batch * (1 if cfg is None else 2), length, vocabulary) * 3
    seeds = torch.arange(batch)
    filters = dict(cfg=cfg, top_k=min(900, vocabulary // 4), top_p=0.96)
    kept = keep_top(guided(logits, cfg), filters["top_k"], filters["top_p"])
    return Contest(
        {
            "var_ext": lambda: ops.sample_tokens(logits, seeds, scale_index=9, **filters),
            "reference": lambda: reference.sample_tokens(logits, seeds, scale_index=9, **filters),
            "sort + multinomial": partial(by_multinomial, logits, **filters),
        },
        bytes=nbytes(logits) + batch * length * 8,
        check=same,
        checks={"sort + multinomial": partial(allowed, kept)},
    )


def test_sample_tokens(race) -> None:
    race()
