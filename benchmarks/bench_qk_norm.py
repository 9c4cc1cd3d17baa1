"""qk_norm of d16 with guidance: a whole training sequence, and the last scale of sampling into the cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from contest import Contest, compiled, nbytes

from var_ext import ops, reference

SHAPES = {
    "2 x 680 x 3 x 16 x 64": dict(batch=2, length=680, heads=16, dim=64, offset=None),
    "2 x 256 x 3 x 16 x 64, into the cache": dict(batch=2, length=256, heads=16, dim=64, offset=424),
}
SMOKE = dict(batch=1, length=3, heads=2, dim=8, offset=2)
COMPETITORS = ("var_ext", "reference", "torch.compile")


def contest(batch: int, length: int, heads: int, dim: int, offset: int | None) -> Contest:
    qkv = torch.randn(batch, length, 3, heads, dim)
    arguments = (qkv, *torch.randn(2, heads, dim), torch.randn(heads))

    def entrant(function: Callable[..., Any]) -> Callable[[], Any]:
        if offset is None:
            return partial(function, *arguments)
        cache = tuple(torch.zeros(batch, offset + length, heads, dim) for _ in range(2))
        return lambda: (function(*arguments, cache=cache, offset=offset), *cache)

    return Contest(
        {
            "var_ext": entrant(ops.qk_norm),
            "reference": entrant(reference.qk_norm),
            "torch.compile": entrant(compiled(reference.qk_norm)),
        },
        bytes=nbytes(qkv, qkv),
    )


def test_qk_norm(race) -> None:
    race()
