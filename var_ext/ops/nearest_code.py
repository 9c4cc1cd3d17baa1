"""Codebook search."""

from __future__ import annotations

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import check_dtype, check_last_dim, check_shape, check_together, require
from var_ext.ops._native import kernels, maybe_view, scratch, view
from var_ext.ops._registry import implement


def _native(x: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    from var_ext import _C

    out = _fake(x, codebook, cosine)
    memory = scratch(x, _C.nearest_code_scratch(x.shape[0], *codebook.shape))
    kernels(x).nearest_code(view(x), view(codebook), view(out), cosine, maybe_view(memory))
    return out


def _fake(x: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


implement(
    "nearest_code",
    "nearest_code(Tensor x, Tensor codebook, bool cosine) -> Tensor",
    native=_native,
    fallback=lambda x, codebook, cosine: reference.nearest_code(x, codebook, cosine=cosine),
    fake=_fake,
)


def nearest_code(x: Tensor, codebook: Tensor, *, cosine: bool = False) -> Tensor:
    """Index of the code nearest to each vector (paper, eq. 2). Not differentiable.

    Args:
        x: (..., C) float32, any strides.
        codebook: (V, C) float32, V >= 1.
        cosine: compare by cosine similarity instead of squared L2 distance.

    Returns:
        (...) int64; among equally near codes the lowest index.

    Raises:
        ValueError: shapes do not match, the codebook is empty, or tensors lie on different devices.
        TypeError: a tensor is not float32: the quantizer works in full precision.
    """
    check_shape("nearest_code", "codebook", codebook, "(V, C)", None, None)
    require(codebook.shape[0] > 0, "nearest_code", "codebook must hold a code", tuple(codebook.shape))
    check_last_dim("nearest_code", "x", x, "(..., C)", codebook.shape[1])
    check_dtype("nearest_code", "x", x, (torch.float32,))
    check_together("nearest_code", x=x, codebook=codebook)
    x, codebook = x.detach(), codebook.detach()
    if backend.current() == "reference":
        return reference.nearest_code(x, codebook, cosine=cosine)
    index = torch.ops.var_ext.nearest_code.default(x.reshape(-1, x.shape[-1]), codebook, cosine)
    return index.view(x.shape[:-1])
