"""The whole coarse-to-fine quantization of a feature map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from var_ext import backend, reference
from var_ext.ops._checks import check_dtype, check_shape, check_together, require
from var_ext.ops._native import kernels, maybe_view, scratch, view
from var_ext.ops._registry import differentiate, implement
from var_ext.schedule import ScaleSchedule


def _composed(
    features: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    phi_index: list[int],
    patch_nums: list[int],
    ratio: float,
    cosine: bool,
    per_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from var_ext import ops

    tokens, f_hat, scales = reference.residual_quantize(
        features,
        codebook,
        phi_weight,
        phi_bias,
        phi_index,
        ScaleSchedule(patch_nums),
        ratio=ratio,
        cosine=cosine,
        per_scale=per_scale,
        primitives=ops,
    )
    return tokens, f_hat, features.new_empty(0) if scales is None else scales


def _native(
    features: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    phi_index: list[int],
    patch_nums: list[int],
    ratio: float,
    cosine: bool,
    per_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from var_ext import _C

    phi_weight, phi_bias = phi_weight.contiguous(), phi_bias.contiguous()
    outputs = _fake(features, codebook, phi_weight, phi_bias, phi_index, patch_nums, ratio, cosine, per_scale)
    tokens, f_hat, scales = outputs
    batch, channels = features.shape[:2]
    memory = scratch(features, _C.residual_quantize_scratch(batch, channels, codebook.shape[0], patch_nums))
    kernels(features).residual_quantize(
        view(features),
        view(codebook),
        view(phi_weight),
        view(phi_bias),
        phi_index,
        patch_nums,
        ratio,
        cosine,
        view(tokens),
        view(f_hat),
        view(scales) if per_scale else None,
        maybe_view(memory),
    )
    return outputs


def _fake(
    features: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    phi_index: list[int],
    patch_nums: list[int],
    ratio: float,
    cosine: bool,
    per_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count = sum(side * side for side in patch_nums)
    return (
        features.new_empty((features.shape[0], count), dtype=torch.int64),
        features.new_empty(features.shape),
        features.new_empty((len(patch_nums), *features.shape) if per_scale else 0),
    )


def _composed_backward(
    grad_scales: Tensor,
    tokens: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_index: list[int],
    patch_nums: list[int],
    ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = (
        torch.zeros_like(codebook, memory_format=torch.contiguous_format),
        torch.zeros_like(phi_weight, memory_format=torch.contiguous_format),
        phi_weight.new_zeros(phi_weight.shape[:2]),
    )
    grad = torch.zeros_like(grad_scales[0])  # what scale k adds is in f_hat after it and after all finer ones
    schedule = ScaleSchedule(patch_nums)
    for k in reversed(range(len(schedule))):
        grad = grad + grad_scales[k]
        index, n, p = tokens[:, schedule.slices[k]], phi_index[k], patch_nums[k]
        codes = F.embedding(index, codebook).transpose(1, 2).unflatten(2, (p, p))  # (B, C, p, p)
        parts = torch.ops.var_ext.residual_step_backward.default(
            grad, codes, phi_weight[n], ratio, True, True
        )
        grads[0].index_add_(0, index.flatten(), parts[0].permute(0, 2, 3, 1).flatten(0, 2))
        grads[1][n] += parts[1]
        grads[2][n] += parts[2]
    return grads


def _native_backward(
    grad_scales: Tensor,
    tokens: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_index: list[int],
    patch_nums: list[int],
    ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from var_ext import _C

    grad_scales, tokens = grad_scales.contiguous(), tokens.contiguous()
    phi_weight = phi_weight.contiguous()
    outputs = _fake_backward(grad_scales, tokens, codebook, phi_weight, phi_index, patch_nums, ratio)
    batch, channels = grad_scales.shape[1:3]
    memory = scratch(grad_scales, _C.residual_quantize_backward_scratch(batch, channels, patch_nums))
    kernels(grad_scales).residual_quantize_backward(
        view(grad_scales),
        view(tokens),
        view(codebook),
        view(phi_weight),
        phi_index,
        patch_nums,
        ratio,
        *map(view, outputs),
        maybe_view(memory),
    )
    return outputs


def _fake_backward(
    grad_scales: Tensor,
    tokens: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_index: list[int],
    patch_nums: list[int],
    ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        codebook.new_empty(codebook.shape),
        phi_weight.new_empty(phi_weight.shape),
        phi_weight.new_empty(phi_weight.shape[:2]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    features, codebook, phi_weight, phi_bias, phi_index, patch_nums, ratio, _, _ = inputs
    tokens, f_hat, scales = output
    fixed = [tokens]
    if not features.requires_grad:
        fixed.append(f_hat)
    if not (codebook.requires_grad or phi_weight.requires_grad or phi_bias.requires_grad):
        fixed.append(scales)
    ctx.mark_non_differentiable(*fixed)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tokens, codebook, phi_weight)
    ctx.plan = phi_index, patch_nums, ratio


def _gradient(
    ctx: Any, grad_tokens: None, grad_f_hat: Tensor | None, grad_scales: Tensor | None
) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if grad_scales is not None and grad_scales.numel() and any(ctx.needs_input_grad[1:4]):
        grads = torch.ops.var_ext.residual_quantize_backward.default(
            grad_scales, *ctx.saved_tensors, *ctx.plan
        )
    return grad_f_hat, *grads, None, None, None, None, None


implement(
    "residual_quantize",
    "residual_quantize(Tensor features, Tensor codebook, Tensor phi_weight, Tensor phi_bias, int[] phi_index, "
    "int[] patch_nums, float ratio, bool cosine, bool per_scale) -> (Tensor, Tensor, Tensor)",
    native=_native,
    fallback=_composed,
    fake=_fake,
)
implement(
    "residual_quantize",
    "residual_quantize_backward(Tensor grad_scales, Tensor tokens, Tensor codebook, Tensor phi_weight, "
    "int[] phi_index, int[] patch_nums, float ratio) -> (Tensor, Tensor, Tensor)",
    native=_native_backward,
    fallback=_composed_backward,
    fake=_fake_backward,
)
differentiate("residual_quantize", _gradient, _setup_context)


def residual_quantize(
    features: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    phi_index: Sequence[int],
    schedule: ScaleSchedule,
    *,
    ratio: float = 0.5,
    cosine: bool = False,
    per_scale: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize features scale by scale, each scale coding the residual of the coarser ones (paper, Algorithm 1).

    Gradients: f_hat passes its gradient straight through to `features`; `scales` passes its own to the codebook and
    the phi convolutions; tokens have none.

    Args:
        features: (B, C, P, P) float32, P the side of the last scale.
        codebook: (V, C) float32.
        phi_weight, phi_bias: the N convolutions, (N, C, C, 3, 3) and (N, C).
        phi_index: (K,) which convolution each scale takes, in 0..N-1.
        schedule: the K scales, L tokens in all.
        ratio: weight of the convolution in phi.
        cosine: search by cosine similarity instead of squared L2 distance.
        per_scale: also return f_hat after each scale.

    Returns:
        tokens (B, L) int64; f_hat (B, C, P, P); scales (K, B, C, P, P), or None unless asked for.

    Raises:
        ValueError: shapes do not match, phi_index is out of range, or tensors lie on different devices.
        TypeError: a tensor is not float32: the quantizer works in full precision.
    """
    op = "residual_quantize"
    check_shape(op, "codebook", codebook, "(V, C)", None, None)
    require(codebook.shape[0] > 0, op, "codebook must hold a code", tuple(codebook.shape))
    channels, side = codebook.shape[1], schedule.side
    check_shape(op, "features", features, "(B, C, P, P)", None, channels, side, side)
    check_shape(op, "phi_weight", phi_weight, "(N, C, C, 3, 3)", None, channels, channels, 3, 3)
    check_shape(op, "phi_bias", phi_bias, "(N, C)", phi_weight.shape[0], channels)
    index = list(phi_index)
    require(
        len(index) == len(schedule) and all(0 <= n < phi_weight.shape[0] for n in index),
        op,
        f"phi_index must name one of {phi_weight.shape[0]} convolutions for each of {len(schedule)} scales",
        index,
    )
    check_dtype(op, "features", features, (torch.float32,))
    check_together(op, features=features, codebook=codebook, phi_weight=phi_weight, phi_bias=phi_bias)
    if backend.current() == "reference":
        return reference.residual_quantize(
            features,
            codebook,
            phi_weight,
            phi_bias,
            index,
            schedule,
            ratio=ratio,
            cosine=cosine,
            per_scale=per_scale,
        )
    tokens, f_hat, scales = torch.ops.var_ext.residual_quantize.default(
        features, codebook, phi_weight, phi_bias, index, schedule.patch_nums, ratio, cosine, per_scale
    )
    return tokens, f_hat, scales if per_scale else None
