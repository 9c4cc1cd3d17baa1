"""block_causal_attention of d16 over the ten scales of 256 px, forward alone and with the backward pass.

Besides the dense mask of the reference: the mask made once, SDPA on each scale's own slice (no mask, nothing
wasted), and FlexAttention with the same block mask, compiled; it has no backward pass on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from contest import Contest, agree, agree_in_16_bits, compiled, nbytes
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from var_ext import ScaleSchedule, ops, reference
from var_ext.reference.block_causal_attention import block_causal_mask
from var_ext.schedule import SCALES_256

SHAPES = {
    f"2 x 680 x 16 x 64, {way}{suffix}": dict(
        batch=2, heads=16, dim=64, patch_nums=SCALES_256, dtype=dtype, training=way != "forward"
    )
    for way in ("forward", "forward + backward")
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, ", bf16"))
}
SMOKE = dict(batch=1, heads=2, dim=16, patch_nums=(1, 2, 3), dtype=torch.float32, training=False)
COMPETITORS = ("var_ext", "reference", "SDPA, mask kept", "SDPA a scale", "FlexAttention")


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """All of (B, L, H, D), as the op has it."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, L, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).transpose(1, 2).contiguous()


def sdpa_a_scale(q: Tensor, k: Tensor, v: Tensor, schedule: ScaleSchedule) -> Tensor:
    return torch.cat([sdpa(q[:, s], k[:, : s.stop], v[:, : s.stop]) for s in schedule.slices], dim=1)


def trained(function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """The result and the gradients of q, k and v."""
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def contest(
    batch: int, heads: int, dim: int, patch_nums: tuple[int, ...], dtype: torch.dtype, training: bool
) -> Contest:
    schedule = ScaleSchedule(patch_nums)
    length = schedule.num_tokens
    q, k, v = (
        torch.randn(batch, length, 3, heads, dim).mul(dim**-0.25).to(dtype).unbind(2)
    )  # (B, L, H, D), strided as qkv is
    mask = block_causal_mask(schedule, q.device)  # (L, L)
    scale_of = torch.repeat_interleave(torch.tensor(schedule.lengths))  # (L,)
    block_mask = create_block_mask(
        lambda b, h, row, column: scale_of[row] >= scale_of[column], None, None, length, length, device="cpu"
    )

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return flex_attention(q, k, v, block_mask=block_mask, scale=1.0).transpose(1, 2).contiguous()

    functions: dict[str, Callable[..., Tensor]] = {
        "var_ext": partial(ops.block_causal_attention, schedule=schedule),
        "reference": partial(reference.block_causal_attention, schedule=schedule),
        "SDPA, mask kept": partial(sdpa, mask=mask),
        "SDPA a scale": partial(sdpa_a_scale, schedule=schedule),
        "FlexAttention": flex,
    }
    calls: dict[str, Callable[[], object]]
    if training:
        leaves, grad = [t.requires_grad_() for t in (q, k, v)], torch.randn_like(q)
        calls = {name: partial(trained, function, leaves, grad) for name, function in functions.items()}
    else:
        calls = {name: partial(function, q, k, v) for name, function in functions.items()}
        calls["FlexAttention"] = compiled(flex, q, k, v)

    pairs = sum(n * s.stop for n, s in zip(schedule.lengths, schedule.slices, strict=True))
    products = 2 + 5 * training  # of all pairs of tokens by D
    return Contest(
        calls,
        bytes=nbytes(q, k, v, q) * (3 if training else 1),  # backward: these, their gradients
        flops=2 * products * batch * heads * dim * pairs,
        check=agree if dtype == torch.float32 else agree_in_16_bits,
    )


def test_block_causal_attention(race, shape: str, competitor: str) -> None:
    if competitor == "FlexAttention" and "backward" in shape:
        pytest.skip("FlexAttention does not support backward on CPU")
    race()
