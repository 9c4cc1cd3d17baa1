"""block_causal_attention over the ten scales of an image, forward alone and with the backward pass.

Besides the dense mask of the reference: the mask made once, SDPA on each scale's own slice (no mask, nothing
wasted), and FlexAttention with the same block mask, compiled; it has no backward pass on the CPU. On a GPU, where it
is installed, flash-attn on each scale's own slice as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from harness.case import Case, agree, agree_in_16_bits, compiled, nbytes
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from var_ext import ScaleSchedule, ops, reference
from var_ext.reference.block_causal_attention import block_causal_mask
from var_ext.schedule import SCALES_256, SCALES_512

SHAPES = {
    f"2 x 680 x 16 x 64, {way}{suffix}": dict(
        batch=2, heads=16, dim=64, patch_nums=SCALES_256, dtype=dtype, training=way != "forward"
    )
    for way in ("forward", "forward + backward")
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, ", bf16"))
}
GPU_SHAPES = {
    f"{batch} x {ScaleSchedule(scales).num_tokens} x {heads} x 64, {way}, {dtype}": dict(
        batch=batch, heads=heads, dim=64, patch_nums=scales, dtype=kind, training=way != "forward"
    )
    for dtype, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
    for batch, scales, heads in (
        (32, SCALES_256, 16),  # d16, 512 heads in all
        (16, SCALES_256, 16),  # eight images with guidance
        (16, SCALES_256, 30),  # d30
        (8, SCALES_512, 16),
    )
    for way in ("forward", "forward + backward")
    if dtype == "bf16" or (batch == 32 and (dtype == "fp16" or way == "forward"))
}
SMOKE = dict(batch=1, heads=2, dim=16, patch_nums=(1, 2, 3), dtype=torch.float32, training=False)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """All of (B, L, H, D), as the op has it."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, L, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).transpose(1, 2).contiguous()


def sdpa_a_scale(q: Tensor, k: Tensor, v: Tensor, schedule: ScaleSchedule) -> Tensor:
    return torch.cat([sdpa(q[:, s], k[:, : s.stop], v[:, : s.stop]) for s in schedule.slices], dim=1)


def flash_a_scale(q: Tensor, k: Tensor, v: Tensor, schedule: ScaleSchedule) -> Tensor:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    parts = [
        flash_attn_func(q[:, s], k[:, : s.stop], v[:, : s.stop], softmax_scale=1.0) for s in schedule.slices
    ]
    return torch.cat(parts, dim=1)


def trained(function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """The result and the gradients of q, k and v."""
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def case(
    batch: int, heads: int, dim: int, patch_nums: tuple[int, ...], dtype: torch.dtype, training: bool
) -> Case:
    schedule = ScaleSchedule(patch_nums)
    length = schedule.num_tokens
    q, k, v = (
        torch.randn(batch, length, 3, heads, dim).mul(dim**-0.25).to(dtype).unbind(2)
    )  # (B, L, H, D), strided as qkv is
    mask = block_causal_mask(schedule, q.device)  # (L, L)
    scale_of = torch.tensor([i for i, n in enumerate(schedule.lengths) for _ in range(n)])  # (L,)
    block_mask = create_block_mask(
        lambda b, h, row, column: scale_of[row] >= scale_of[column],
        None,
        None,
        length,
        length,
        device=str(q.device),
    )

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return flex_attention(q, k, v, block_mask=block_mask, scale=1.0).transpose(1, 2).contiguous()

    functions: dict[str, Callable[..., Tensor]] = {
        "var_ext": partial(ops.block_causal_attention, schedule=schedule),
        "reference": partial(reference.block_causal_attention, schedule=schedule),
        "SDPA, mask kept": partial(sdpa, mask=mask),
        "SDPA a scale": partial(sdpa_a_scale, schedule=schedule),
        "FlexAttention": compiled(flex) if q.is_cuda else flex,
    }
    if q.is_cuda and dtype != torch.float32 and find_spec("flash_attn"):
        functions["flash-attn a scale"] = partial(flash_a_scale, schedule=schedule)
    calls: dict[str, Callable[[], object]]
    if training:
        leaves, grad = [t.requires_grad_() for t in (q, k, v)], torch.randn_like(q)
        calls = {name: partial(trained, function, leaves, grad) for name, function in functions.items()}
        if q.device.type == "cpu":
            del calls["FlexAttention"]  # has no backward pass there
    else:
        calls = {name: partial(function, q, k, v) for name, function in functions.items()}
        calls["FlexAttention"] = compiled(flex, q, k, v)

    pairs = sum(n * s.stop for n, s in zip(schedule.lengths, schedule.slices, strict=True))
    products = 2 + 5 * training  # of all pairs of tokens by D
    return Case(
        calls,
        bytes=nbytes(q, k, v, q) * (3 if training else 1),  # backward: these, their gradients
        flops=2 * products * batch * heads * dim * pairs,
        launches=3 if training else 1,
        check=agree if dtype == torch.float32 else agree_in_16_bits,
    )
