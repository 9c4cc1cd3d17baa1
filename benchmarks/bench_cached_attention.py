"""cached_attention of d16: new keys and values go into the cache, then the queries of their scale attend to it.

An early, a middle and the last scale of 256 px by themselves, then all ten scales one after the other. The batch
counts rows: a picture drawn with guidance has two. "torch.cat + SDPA" grows its cache as published code does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from contest import Contest, agree, agree_in_16_bits, nbytes
from torch import Tensor
from torch.nn import functional as F

from var_ext import ScaleSchedule, ops, reference
from var_ext.schedule import SCALES_256

Steps = list[tuple[int, int]]  # (queries, keys) of each scale
TEN = [(s.stop - s.start, s.stop) for s in ScaleSchedule(SCALES_256).slices]
SHAPES = {
    f"{queries} queries, {length} keys": dict(
        batch=2, heads=16, dim=64, steps=[(queries, length)], dtype=torch.float32
    )
    for queries, length in ((4, 5), (64, 155), (256, 680))
} | {
    f"ten scales, {batch} x 16 x 64{suffix}": dict(batch=batch, heads=16, dim=64, steps=TEN, dtype=dtype)
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, ", bf16"))
    for batch in (1, 8)
}
GPU_SHAPES = {
    f"ten scales, {batch} x {heads} x 64, {dtype}": dict(
        batch=batch, heads=heads, dim=64, steps=TEN, dtype=kind
    )
    for dtype, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
    for batch, heads in ((2, 16), (16, 16), (100, 16), (2, 30))  # an image with guidance, 8, 50; d30
    if dtype == "bf16" or batch == 16
} | {
    f"{queries} queries, {length} keys, {batch} x 16 x 64, bf16": dict(
        batch=batch, heads=16, dim=64, steps=[(queries, length)], dtype=torch.bfloat16
    )
    for batch in (2, 16)
    for queries, length in TEN
}
SMOKE = dict(batch=1, heads=2, dim=16, steps=[(1, 1), (4, 5)], dtype=torch.float32)
COMPETITORS = ("var_ext", "reference", "matmul + softmax", "torch.cat + SDPA")


def by_matmul(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    k, v = k[:, :length], v[:, :length]
    weights = torch.einsum("blhd,bmhd->bhlm", q, k).softmax(dim=-1)
    return torch.einsum("bhlm,bmhd->blhd", weights, v)


def with_cache(
    attention: Callable[..., Tensor], given: Tensor, steps: Steps, caches: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Steps over `given`, (B, L, 3, H, D): slices copied into caches (B, L, H, D) with room for all."""
    results = []
    for queries, length in steps:
        new = slice(length - queries, length)
        q, k, v = given[:, new].unbind(2)
        caches[0][:, new], caches[1][:, new] = k, v
        results.append(attention(q, *caches, length))
    return results


def with_cat(given: Tensor, steps: Steps, past: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The same with a cache that grows: (B, H, L so far, D), heads first as SDPA likes them."""
    results = []
    keys, values = past
    for queries, length in steps:
        q, k, v = given[:, length - queries : length].permute(2, 0, 3, 1, 4).unbind(0)
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        out = F.scaled_dot_product_attention(q, keys, values, scale=1.0)
        results.append(out.transpose(1, 2).contiguous())
    return results


def contest(batch: int, heads: int, dim: int, steps: Steps, dtype: torch.dtype) -> Contest:
    room = max(680, steps[-1][1])
    given = torch.randn(batch, room, 3, heads, dim).mul(dim**-0.25).to(dtype)
    caches = given[:, :, 1].clone(), given[:, :, 2].clone()
    earlier = given[:, : steps[0][1] - steps[0][0]].permute(2, 0, 3, 1, 4)
    past = earlier[1].contiguous(), earlier[2].contiguous()
    cells = batch * heads * dim
    return Contest(
        {
            "var_ext": partial(with_cache, ops.cached_attention, given, steps, caches),
            "reference": partial(with_cache, reference.cached_attention, given, steps, caches),
            "matmul + softmax": partial(with_cache, by_matmul, given, steps, caches),
            "torch.cat + SDPA": partial(with_cat, given, steps, past),
        },
        # q in and out, new keys and values from here to there, the cache read
        bytes=sum(2 * queries + 4 * queries + 2 * length for queries, length in steps)
        * nbytes(given[:1, :1, :1])
        * batch,
        flops=sum(4 * cells * queries * length for queries, length in steps),
        launches=3 * len(steps),  # with the two copies into the cache
        check=agree if dtype == torch.float32 else agree_in_16_bits,
    )


def test_cached_attention(race) -> None:
    race()
