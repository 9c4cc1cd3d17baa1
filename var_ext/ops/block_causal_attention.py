"""Attention of training: every token sees its own scale and all coarser ones."""

from __future__ import annotations

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import FLOATS, check_dtype, check_shape, check_together, require
from var_ext.ops._registry import compose
from var_ext.schedule import ScaleSchedule


def _composed(q: Tensor, k: Tensor, v: Tensor, patch_nums: list[int], scale: float) -> Tensor:
    return reference.block_causal_attention(q, k, v, ScaleSchedule(patch_nums), scale=scale)


compose(
    "block_causal_attention(Tensor q, Tensor k, Tensor v, int[] patch_nums, float scale) -> Tensor", _composed
)


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
    return torch.ops.var_ext.block_causal_attention(q, k, v, schedule.patch_nums, scale)
