"""Attention for training: every token sees its own scale and all coarser ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import FLOATS, check_dtype, check_shape, check_together, require
from var_ext.ops._native import kernels, maybe_view, rows, scratch, view
from var_ext.ops._registry import differentiate, implement
from var_ext.reference.block_causal_attention import block_causal_mask
from var_ext.schedule import ScaleSchedule


def _native(q: Tensor, k: Tensor, v: Tensor, patch_nums: list[int], scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = rows(q), rows(k), rows(v)
    out, lse = _fake(q, k, v, patch_nums, scale)
    kernels(q).block_causal_attention(view(q), view(k), view(v), view(out), view(lse), patch_nums, scale)
    return out, lse


def _native_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    patch_nums: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v = rows(grad), rows(q), rows(k), rows(v)
    dq, dk, dv = _fake_backward(grad, q, k, v, out, lse, patch_nums, scale)
    delta = scratch(q, *lse.shape)
    kernels(q).block_causal_attention_backward(
        view(grad),
        view(q),
        view(k),
        view(v),
        view(out),
        view(lse),
        view(dq),
        view(dk),
        view(dv),
        maybe_view(delta),
        patch_nums,
        scale,
    )
    return dq, dk, dv


def _fallback(q: Tensor, k: Tensor, v: Tensor, patch_nums: list[int], scale: float) -> tuple[Tensor, Tensor]:
    out = reference.block_causal_attention(q, k, v, ScaleSchedule(patch_nums), scale=scale)
    return out, _empty_lse(q)


def _fallback_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    patch_nums: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # spelt out, in float32 or float64: torch's fused attention cannot be differentiated below autograd
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    grad, q, k, v = (t.to(wide) for t in (grad, q, k, v))
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * scale
    seen = block_causal_mask(ScaleSchedule(patch_nums), q.device)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)  # (B, H, L, L)
    pull = torch.einsum("blhd,bmhd->bhlm", grad, v)
    pull = scale * weights * (pull - (weights * pull).sum(dim=-1, keepdim=True))
    dq = torch.einsum("bhlm,bmhd->blhd", pull, k)
    dk = torch.einsum("bhlm,blhd->bmhd", pull, q)
    dv = torch.einsum("bhlm,blhd->bmhd", weights, grad)
    dq, dk, dv = (t.to(dtype).contiguous() for t in (dq, dk, dv))
    return dq, dk, dv


def _empty_lse(q: Tensor) -> Tensor:
    """Memory for a kernel's log-sum-exp (B, H, L); none for the fallback, whose backward does not need it."""
    native = backend.use_native("block_causal_attention", q.device.type) and q.dtype != torch.float64
    shape = (q.shape[0], q.shape[2], q.shape[1]) if native else (0,)
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _fake(q: Tensor, k: Tensor, v: Tensor, patch_nums: list[int], scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), _empty_lse(q)


def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    patch_nums: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.patch_nums, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.var_ext.block_causal_attention_backward.default
    return *gradient(grad, *ctx.saved_tensors, ctx.patch_nums, ctx.scale), None, None


implement(
    "block_causal_attention",
    "block_causal_attention(Tensor q, Tensor k, Tensor v, int[] patch_nums, float scale) -> (Tensor, Tensor)",
    native=_native,
    fallback=_fallback,
    fake=_fake,
    float64=False,
)
implement(
    "block_causal_attention",
    "block_causal_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "int[] patch_nums, float scale) -> (Tensor, Tensor, Tensor)",
    native=_native_backward,
    fallback=_fallback_backward,
    fake=_fake_backward,
    float64=False,
)
differentiate("block_causal_attention", _backward, _setup_context)


def block_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, schedule: ScaleSchedule, *, scale: float = 1.0
) -> Tensor:
    """softmax(scale q k^T + mask) v under the block-causal mask of a schedule (paper, section 3.2 and figure 4).

    Args:
        q, k, v: (B, L, H, D) each, float32, bfloat16, float16 or float64; views of one packed qkv are welcome.
        schedule: the scales, L tokens in all.
        scale: factor on q k^T; 1 where q and k are L2-normalized.

    Returns:
        (B, L, H, D), contiguous, dtype of q.

    Raises:
        ValueError: shapes differ, the schedule does not sum to L, or tensors lie on different devices.
        TypeError: dtypes differ or are not supported.
    """
    op = "block_causal_attention"
    check_shape(op, "q", q, "(B, L, H, D)", None, None, None, None)
    check_shape(op, "k", k, "(B, L, H, D)", *q.shape)
    check_shape(op, "v", v, "(B, L, H, D)", *q.shape)
    require(
        q.shape[1] == schedule.num_tokens,
        op,
        f"q must have the L = {schedule.num_tokens} of the schedule",
        q.shape[1],
    )
    check_dtype(op, "q", q, FLOATS)
    check_together(op, q=q, k=k, v=v)
    if backend.current() == "reference":
        return reference.block_causal_attention(q, k, v, schedule, scale=scale)
    out, _ = torch.ops.var_ext.block_causal_attention.default(q, k, v, schedule.patch_nums, scale)
    return out
