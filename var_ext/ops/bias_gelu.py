"""Bias and GELU, between the two linear layers of the transformer's feed-forward part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import FLOATS, check_dtype, check_last_dim, check_shape, check_together
from var_ext.ops._native import kernels, maybe_view, scratch, view
from var_ext.ops._registry import differentiate, implement


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> Tensor:
    """x itself if its channels are dense and its rows evenly spaced, else a copy."""
    if x.is_contiguous():
        return x
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _native(x: Tensor, bias: Tensor) -> Tensor:
    out = _empty(x)
    x, bias = _rows(x), bias.contiguous()
    kernels(x).bias_gelu(view(x), view(bias), view(out if x.ndim == out.ndim else out.view(x.shape)))
    return out


def _native_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_bias = _fake_backward(grad, x, bias)
    x, grad, bias = _rows(x), grad.contiguous(), bias.contiguous()
    flat_grad, flat_grad_x = (
        (grad, grad_x) if x.ndim == grad.ndim else (grad.view(x.shape), grad_x.view(x.shape))
    )
    channels = len(bias)
    sums = scratch(x, _partials(x.numel() // max(channels, 1), channels), channels)
    given = view(flat_grad), view(x), view(bias)
    kernels(x).bias_gelu_backward(*given, view(flat_grad_x), view(grad_bias), maybe_view(sums))
    return grad_x, grad_bias


def _partials(rows: int, channels: int) -> int:
    """Number of row chunks of the CUDA kernel: gradients depend on it, so it is the same on all chips.

    A block has 256 channels in 16 bits: 8 blocks for each of 132 multiprocessors, but at least 16 rows per chunk.
    """
    return max(1, min(-(-rows // 16), 1056 // -(-max(channels, 1) // 256)))


def _fake_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(x), _empty(bias)


def _reference_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    u = x.to(wide) + bias.to(wide)
    grad_x = torch.ops.aten.gelu_backward(grad.to(wide), u, approximate="tanh")
    grad_bias = grad_x.flatten(0, -2).sum(0) if x.ndim > 1 else grad_x
    return _empty(x).copy_(grad_x), _empty(bias).copy_(grad_bias)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.var_ext.bias_gelu_backward.default(grad, *ctx.saved_tensors)


implement(
    "bias_gelu",
    "bias_gelu(Tensor x, Tensor bias) -> Tensor",
    native=_native,
    fallback=lambda x, bias: reference.bias_gelu(x, bias).contiguous(),
    fake=lambda x, bias: _empty(x),
    float64=False,
)
implement(
    "bias_gelu",
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)",
    native=_native_backward,
    fallback=_reference_backward,
    fake=_fake_backward,
    float64=False,
)
differentiate("bias_gelu", _gradient, _setup_context)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias) in its tanh form (arXiv 1606.08415): 0.5 u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))).

    Args:
        x: (..., C), float32, bfloat16, float16 or float64; copied first if its last axis is not dense.
        bias: (C,), dtype of x.

    Returns:
        (..., C), dtype of x, contiguous; computed in float32 at least.

    Raises:
        ValueError: shapes do not match, or tensors lie on different devices.
        TypeError: dtypes differ or are not supported.
    """
    check_shape("bias_gelu", "bias", bias, "(C,)", None)
    check_last_dim("bias_gelu", "x", x, "(..., C)", bias.shape[0])
    check_dtype("bias_gelu", "x", x, FLOATS)
    check_together("bias_gelu", x=x, bias=bias)
    if backend.current() == "reference":
        return reference.bias_gelu(x, bias)
    return torch.ops.var_ext.bias_gelu.default(x, bias)
