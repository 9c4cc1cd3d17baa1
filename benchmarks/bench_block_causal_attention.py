"""block_causal_attention of d16 over the ten scales of 256 px.

Besides the dense mask of the reference: the mask made once, SDPA on each scale's own slice (no mask, nothing
wasted), and FlexAttention with the same block mask.
"""

from __future__ import annotations

from functools import partial

import torch
from contest import Contest, compiled, nbytes
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from var_ext import ScaleSchedule, ops, reference
from var_ext.reference.block_causal_attention import block_causal_mask
from var_ext.schedule import SCALES_256

SHAPES = {"2 x 680 x 16 x 64": dict(batch=2, heads=16, dim=64, patch_nums=SCALES_256)}
SMOKE = dict(batch=1, heads=2, dim=16, patch_nums=(1, 2, 3))
COMPETITORS = ("var_ext", "reference", "SDPA, mask kept", "SDPA a scale", "FlexAttention")


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """All of (B, L, H, D), as the op has it."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, L, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).transpose(1, 2).contiguous()


def sdpa_a_scale(q: Tensor, k: Tensor, v: Tensor, schedule: ScaleSchedule) -> Tensor:
    return torch.cat([sdpa(q[:, s], k[:, : s.stop], v[:, : s.stop]) for s in schedule.slices], dim=1)


def contest(batch: int, heads: int, dim: int, patch_nums: tuple[int, ...]) -> Contest:
    schedule = ScaleSchedule(patch_nums)
    length = schedule.num_tokens
    q, k, v = (
        torch.randn(batch, length, 3, heads, dim).mul(dim**-0.25).unbind(2)
    )  # (B, L, H, D), strided as qkv is
    mask = block_causal_mask(schedule, q.device)  # (L, L)
    scale_of = torch.repeat_interleave(torch.tensor(schedule.lengths))  # (L,)
    block_mask = create_block_mask(
        lambda b, h, row, column: scale_of[row] >= scale_of[column], None, None, length, length, device="cpu"
    )

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return flex_attention(q, k, v, block_mask=block_mask, scale=1.0).transpose(1, 2).contiguous()

    pairs = sum(n * s.stop for n, s in zip(schedule.lengths, schedule.slices, strict=True))
    return Contest(
        {
            "var_ext": lambda: ops.block_causal_attention(q, k, v, schedule),
            "reference": lambda: reference.block_causal_attention(q, k, v, schedule),
            "SDPA, mask kept": partial(sdpa, q, k, v, mask),
            "SDPA a scale": partial(sdpa_a_scale, q, k, v, schedule),
            "FlexAttention": compiled(flex, q, k, v),
        },
        bytes=nbytes(q, k, v, q),
        flops=4 * batch * heads * dim * pairs,
    )


def test_block_causal_attention(race) -> None:
    race()
