"""cached_attention of d16 with guidance: an early, a middle and the last scale of 256 px with the cache."""

from __future__ import annotations

import torch
from contest import Contest, nbytes
from torch import Tensor

from var_ext import ops, reference

SHAPES = {
    f"{queries} queries, {length} keys": dict(
        batch=2, heads=16, dim=64, queries=queries, length=length, room=680
    )
    for queries, length in ((4, 5), (64, 155), (256, 680))
}
SMOKE = dict(batch=1, heads=2, dim=16, queries=4, length=5, room=14)
COMPETITORS = ("var_ext", "reference", "matmul + softmax")


def by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("blhd,bmhd->bhlm", q, k).softmax(dim=-1)
    return torch.einsum("bhlm,bmhd->blhd", weights, v)


def contest(batch: int, heads: int, dim: int, queries: int, length: int, room: int) -> Contest:
    q = torch.randn(batch, queries, heads, dim).mul(dim**-0.25)
    keys, values = torch.randn(2, batch, room, heads, dim).mul(dim**-0.25)
    k, v = keys[:, :length], values[:, :length]
    return Contest(
        {
            "var_ext": lambda: ops.cached_attention(q, keys, values, length),
            "reference": lambda: reference.cached_attention(q, keys, values, length),
            "matmul + softmax": lambda: by_matmul(q, k, v),
        },
        bytes=nbytes(q, q, k, v),
        flops=4 * batch * heads * dim * queries * length,
    )


def test_cached_attention(race) -> None:
    race()
