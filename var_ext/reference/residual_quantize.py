"""Reference of `residual_quantize`."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from var_ext import reference
from var_ext.reference.residual_step import upsampled_phi
from var_ext.schedule import ScaleSchedule


def residual_quantize(
    features: Tensor,  # (B, C, P, P)
    codebook: Tensor,  # (V, C)
    phi_weight: Tensor,  # (N, C, C, 3, 3)
    phi_bias: Tensor,  # (N, C)
    phi_index: Sequence[int],  # (K,)
    schedule: ScaleSchedule,
    *,
    ratio: float = 0.5,
    cosine: bool = False,
    per_scale: bool = False,
    primitives: ModuleType = reference,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The coarse-to-fine loop: residual -> tokens -> codes -> f_hat -> residual.

    `primitives` provides search and interpolation: this package, or `var_ext.ops` with its kernels.
    """
    side = schedule.side
    target = features.detach()
    f_hat = torch.zeros_like(target, memory_format=torch.contiguous_format)
    tokens, scales = [], []
    for k, p in enumerate(schedule.patch_nums):
        residual = target - f_hat.detach()
        z = residual if p == side else primitives.area_downsample(residual, p)  # (B, C, p, p)
        index = primitives.nearest_code(z.permute(0, 2, 3, 1), codebook.detach(), cosine=cosine)  # (B, p, p)
        embedding = F.embedding(index, codebook).permute(0, 3, 1, 2)  # (B, C, p, p)
        n = phi_index[k]
        f_hat = f_hat + upsampled_phi(embedding, (side, side), phi_weight[n], phi_bias[n], ratio, primitives)
        tokens.append(index.flatten(1))
        scales.append(f_hat)
    straight_through = f_hat.detach() + (features - target)
    return torch.cat(tokens, dim=1), straight_through, torch.stack(scales) if per_scale else None
