"""The whole coarse-to-fine quantization of a feature map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import check_dtype, check_shape, check_together, require
from var_ext.ops._registry import compose
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


compose(
    "residual_quantize(Tensor features, Tensor codebook, Tensor phi_weight, Tensor phi_bias, int[] phi_index, "
    "int[] patch_nums, float ratio, bool cosine, bool per_scale) -> (Tensor, Tensor, Tensor)",
    _composed,
)


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
    """Quantize features scale by scale, each scale coding what the coarser ones left (paper, Algorithm 1).

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
    tokens, f_hat, scales = torch.ops.var_ext.residual_quantize(
        features, codebook, phi_weight, phi_bias, index, schedule.patch_nums, ratio, cosine, per_scale
    )
    return tokens, f_hat, scales if per_scale else None
