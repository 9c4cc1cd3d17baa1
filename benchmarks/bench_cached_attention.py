"""cached_attention of d16: qkv is normed, keys and values go into the cache, and the scale's queries attend to it.

An early, a middle and the last scale of 256 px by themselves, then all ten scales one after the other. The batch
counts rows: a picture drawn with guidance has two. "torch.cat + SDPA" grows its cache as published code does.
On a GPU each of the ten scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from harness.case import Case, agree, agree_in_16_bits, nbytes
from torch import Tensor
from torch.nn import functional as F

from var_ext import ScaleSchedule, ops, reference
from var_ext.schedule import SCALES_256

Steps = list[tuple[int, int]]  # (queries, keys) of each scale
Parameters = tuple[Tensor, Tensor, Tensor]  # q_bias and v_bias (H, D), log_scale (H,)
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


def eager_norm(qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    q, k, v = qkv.unbind(2)  # (B, L, H, D)
    q = F.normalize(q + q_bias, dim=-1) * log_scale.clamp_max(math.log(100)).exp()[:, None]
    return q, F.normalize(k, dim=-1), v + v_bias


def by_matmul(
    qkv: Tensor,
    q_bias: Tensor,
    v_bias: Tensor,
    log_scale: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    offset: int,
) -> Tensor:
    end = offset + qkv.shape[1]
    q, k_cache[:, offset:end], v_cache[:, offset:end] = eager_norm(qkv, q_bias, v_bias, log_scale)
    weights = torch.einsum("blhd,bmhd->bhlm", q, k_cache[:, :end]).softmax(dim=-1)
    return torch.einsum("bhlm,bmhd->blhd", weights, v_cache[:, :end])


def with_cache(
    attention: Callable[..., Tensor],
    given: Tensor,
    steps: Steps,
    caches: tuple[Tensor, Tensor],
    parameters: Parameters,
) -> list[Tensor]:
    """Steps over `given`, (B, L, 3, H, D), with caches (B, L, H, D) that have room for all."""
    return [
        attention(given[:, length - queries : length], *parameters, *caches, length - queries)
        for queries, length in steps
    ]


def with_cat(
    given: Tensor, steps: Steps, past: tuple[Tensor, Tensor], parameters: Parameters
) -> list[Tensor]:
    """The same with a cache that grows: (B, H, L so far, D), heads first as SDPA likes them."""
    results = []
    keys, values = past
    for queries, length in steps:
        new = eager_norm(given[:, length - queries : length], *parameters)
        q, k, v = (t.transpose(1, 2) for t in new)
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        out = F.scaled_dot_product_attention(q, keys, values, scale=1.0)
        results.append(out.transpose(1, 2).contiguous())
    return results


def launches(queries: int, dim: int, dtype: torch.dtype) -> int:
    """One where a block has all queries of a head in 16 bits, else `qk_norm` apart."""
    return 1 if dtype != torch.float32 and queries <= (128 if dim <= 64 else 64) else 2


def case(batch: int, heads: int, dim: int, steps: Steps, dtype: torch.dtype) -> Case:
    room = max(680, steps[-1][1])
    given = torch.randn(batch, room, 3, heads, dim).mul(dim**-0.25).to(dtype)
    caches = given[:, :, 1].clone(), given[:, :, 2].clone()
    parameters = (*torch.randn(2, heads, dim).to(dtype), torch.zeros(heads, dtype=dtype))
    earlier = given[:, : steps[0][1] - steps[0][0]].permute(2, 0, 3, 1, 4)
    past = earlier[1].contiguous(), earlier[2].contiguous()
    cells = batch * heads * dim
    return Case(
        {
            "var_ext": partial(with_cache, ops.cached_attention, given, steps, caches, parameters),
            "reference": partial(with_cache, reference.cached_attention, given, steps, caches, parameters),
            "matmul + softmax": partial(with_cache, by_matmul, given, steps, caches, parameters),
            "torch.cat + SDPA": partial(with_cat, given, steps, past, parameters),
        },
        # qkv in, new keys and values and the result out, the cache read
        bytes=sum(6 * queries + 2 * length for queries, length in steps) * nbytes(given[:1, :1, :1]) * batch,
        flops=sum(4 * cells * queries * length for queries, length in steps),
        launches=sum(launches(queries, dim, dtype) for queries, _ in steps),
        check=agree if dtype == torch.float32 else agree_in_16_bits,
    )
