"""cached_attention of d16: new keys and values go into the cache, then the queries of their scale attend to it.

An early, a middle and the last scale of 256 px by themselves, then all ten scales one after the other. The batch
counts rows: a picture drawn with guidance has two. "torch.cat + SDPA" grows its cache as published code does.
On a GPU each of the ten scales, and qk_norm in the place of the copies: bias, norm and scale on the way to the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from contest import Contest, agree, agree_in_16_bits, nbytes
from torch import Tensor
from torch.nn import functional as F

from var_ext import ScaleSchedule, ops, reference
from var_ext.schedule import SCALES_256

Steps = list[tuple[int, int]]  # (queries, keys) of each scale
Parameters = tuple[Tensor, Tensor, Tensor]  # of qk_norm: q_bias and v_bias (H, D), log_scale (H,)
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
        batch=batch, heads=heads, dim=64, steps=TEN, dtype=kind, norm=True
    )
    for dtype, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
    for batch, heads in ((2, 16), (16, 16), (100, 16), (2, 30))  # an image with guidance, 8, 50; d30
    if dtype == "bf16" or batch == 16
} | {
    f"{queries} queries, {length} keys, {batch} x 16 x 64, bf16": dict(
        batch=batch, heads=16, dim=64, steps=[(queries, length)], dtype=torch.bfloat16, norm=True
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


def copied(new: Tensor, cache: tuple[Tensor, Tensor], offset: int) -> Tensor:
    """Keys and values of (B, L, 3, H, D) into the cache; returns the queries."""
    q, k, v = new.unbind(2)
    cache[0][:, offset : offset + k.shape[1]] = k
    cache[1][:, offset : offset + v.shape[1]] = v
    return q


def eager_norm(qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    q, k, v = qkv.unbind(2)  # (B, L, H, D)
    q = F.normalize(q + q_bias, dim=-1) * log_scale.clamp_max(math.log(100)).exp()[:, None]
    return q, F.normalize(k, dim=-1), v + v_bias


def copied_norm(new: Tensor, *parameters: Tensor, cache: tuple[Tensor, Tensor], offset: int) -> Tensor:
    return copied(torch.stack(eager_norm(new, *parameters), dim=2), cache, offset)


def with_cache(
    attention: Callable[..., Tensor],
    write: Callable[..., Tensor],
    given: Tensor,
    steps: Steps,
    caches: tuple[Tensor, Tensor],
) -> list[Tensor]:
    """Steps over `given`, (B, L, 3, H, D): slices written into caches (B, L, H, D) with room for all."""
    results = []
    for queries, length in steps:
        q = write(given[:, length - queries : length], cache=caches, offset=length - queries)
        results.append(attention(q, *caches, length))
    return results


def with_cat(
    given: Tensor, steps: Steps, past: tuple[Tensor, Tensor], parameters: Parameters | None
) -> list[Tensor]:
    """The same with a cache that grows: (B, H, L so far, D), heads first as SDPA likes them."""
    results = []
    keys, values = past
    for queries, length in steps:
        new = given[:, length - queries : length]
        parts = new.unbind(2) if parameters is None else eager_norm(new, *parameters)
        q, k, v = (t.transpose(1, 2) for t in parts)
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        out = F.scaled_dot_product_attention(q, keys, values, scale=1.0)
        results.append(out.transpose(1, 2).contiguous())
    return results


def contest(
    batch: int, heads: int, dim: int, steps: Steps, dtype: torch.dtype, norm: bool = False
) -> Contest:
    room = max(680, steps[-1][1])
    given = torch.randn(batch, room, 3, heads, dim).mul(dim**-0.25).to(dtype)
    caches = given[:, :, 1].clone(), given[:, :, 2].clone()
    parameters = (*torch.randn(2, heads, dim).to(dtype), torch.zeros(heads, dtype=dtype)) if norm else None
    writers: dict[str, Callable[..., Tensor]] = dict.fromkeys(("op", "reference", "eager"), copied)
    if parameters:
        chosen = {"op": ops.qk_norm, "reference": reference.qk_norm, "eager": copied_norm}
        writers = {
            name: lambda new, write=write, **to: write(new, *parameters, **to)
            for name, write in chosen.items()
        }
    earlier = given[:, : steps[0][1] - steps[0][0]].permute(2, 0, 3, 1, 4)
    past = earlier[1].contiguous(), earlier[2].contiguous()
    cells = batch * heads * dim
    return Contest(
        {
            "var_ext": partial(with_cache, ops.cached_attention, writers["op"], given, steps, caches),
            "reference": partial(
                with_cache, reference.cached_attention, writers["reference"], given, steps, caches
            ),
            "matmul + softmax": partial(with_cache, by_matmul, writers["eager"], given, steps, caches),
            "torch.cat + SDPA": partial(with_cat, given, steps, past, parameters),
        },
        # q in and out, new keys and values from here to there, the cache read
        bytes=sum(2 * queries + 4 * queries + 2 * length for queries, length in steps)
        * nbytes(given[:1, :1, :1])
        * batch,
        flops=sum(4 * cells * queries * length for queries, length in steps),
        launches=(2 if norm else 3) * len(steps),  # two copies, or qk_norm
        check=agree if dtype == torch.float32 else agree_in_16_bits,
    )


def test_cached_attention(race) -> None:
    race()
