"""One decoding step: adds a scale's codes to f_hat and computes the next scale's input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from var_ext import backend, reference
from var_ext.ops._checks import FLOATS, as_size, check_dtype, check_shape, check_together, require
from var_ext.ops._native import kernels, maybe_view, scratch, view
from var_ext.ops._registry import differentiate, implement


def _composed(
    f_hat: Tensor, embedding: Tensor, phi_weight: Tensor, phi_bias: Tensor, next_size: list[int], ratio: float
) -> tuple[Tensor, Tensor]:
    from var_ext import ops

    size = (next_size[0], next_size[1]) if next_size else None
    new, pooled = reference.residual_step(
        f_hat, embedding, phi_weight, phi_bias, next_size=size, ratio=ratio, primitives=ops
    )
    outputs = _fake(f_hat, embedding, phi_weight, phi_bias, next_size, ratio)
    return outputs[0].copy_(new), outputs[1].copy_(pooled) if next_size else outputs[1]


def _native(
    f_hat: Tensor, embedding: Tensor, phi_weight: Tensor, phi_bias: Tensor, next_size: list[int], ratio: float
) -> tuple[Tensor, Tensor]:
    if f_hat.dtype != torch.float32:  # the quantizer works in full precision; other dtypes have no kernel
        return _composed(f_hat, embedding, phi_weight, phi_bias, next_size, ratio)
    phi_weight, phi_bias = phi_weight.contiguous(), phi_bias.contiguous()
    new, pooled = _fake(f_hat, embedding, phi_weight, phi_bias, next_size, ratio)
    kernels(f_hat).residual_step(
        view(f_hat),
        view(embedding),
        view(phi_weight),
        view(phi_bias),
        ratio,
        view(new),
        view(pooled) if next_size else None,
    )
    return new, pooled


def _fake(
    f_hat: Tensor, embedding: Tensor, phi_weight: Tensor, phi_bias: Tensor, next_size: list[int], ratio: float
) -> tuple[Tensor, Tensor]:
    new = f_hat.new_empty(f_hat.shape)
    return new, f_hat.new_empty((*f_hat.shape[:2], *next_size) if next_size else 0)


def _composed_backward(
    grad: Tensor, embedding: Tensor, phi_weight: Tensor, ratio: float, codes: bool, phi: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from var_ext import ops

    (height, width), (h, w) = grad.shape[2:], embedding.shape[2:]
    same = (h, w) == (height, width)
    outputs = _fake_backward(grad, embedding, phi_weight, ratio, codes, phi)
    grads = torch.ops.aten.convolution_backward(
        grad * ratio,
        embedding if same else ops.bicubic_upsample(embedding, (height, width)),
        phi_weight,
        [phi_weight.shape[0]],
        *([1, 1], [1, 1], [1, 1]),  # stride, padding, dilation
        *(False, [0, 0], 1),  # not transposed, in one group
        [codes, phi, phi],
    )
    if codes:
        wide = grad * (1 - ratio) + grads[0]
        outputs[0].copy_(wide if same else torch.ops.var_ext.bicubic_upsample_backward.default(wide, h, w))
    if phi:
        outputs[1].copy_(grads[1])
        outputs[2].copy_(grads[2])
    return outputs


def _native_backward(
    grad: Tensor, embedding: Tensor, phi_weight: Tensor, ratio: float, codes: bool, phi: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if grad.dtype != torch.float32:
        return _composed_backward(grad, embedding, phi_weight, ratio, codes, phi)
    from var_ext import _C

    phi_weight = phi_weight.contiguous()
    outputs = _fake_backward(grad, embedding, phi_weight, ratio, codes, phi)
    wanted = (codes, phi, phi)
    targets = [view(output) if want else None for output, want in zip(outputs, wanted, strict=True)]
    memory = scratch(grad, _C.residual_step_scratch(*grad.shape))
    kernel: Any = kernels(grad).residual_step_backward
    kernel(view(grad), view(embedding), view(phi_weight), ratio, *targets, maybe_view(memory))
    return outputs


def _fake_backward(
    grad: Tensor, embedding: Tensor, phi_weight: Tensor, ratio: float, codes: bool, phi: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        grad.new_empty(embedding.shape if codes else 0),
        grad.new_empty(phi_weight.shape if phi else 0),
        grad.new_empty(phi_weight.shape[0] if phi else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, embedding, phi_weight, _, next_size, ratio = inputs
    ctx.save_for_backward(embedding, phi_weight)
    ctx.has_next, ctx.ratio = len(next_size) > 0, ratio


def _gradient(ctx: Any, grad: Tensor, grad_next: Tensor) -> tuple[Tensor | None, ...]:
    embedding, phi_weight = ctx.saved_tensors
    if ctx.has_next:
        grad = grad + torch.ops.var_ext.area_downsample_backward.default(grad_next, *grad.shape[2:])
    codes, phi = ctx.needs_input_grad[1], ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    if not (codes or phi):
        return grad, None, None, None, None, None
    grads = torch.ops.var_ext.residual_step_backward.default(
        grad, embedding, phi_weight, ctx.ratio, codes, phi
    )
    grad_codes, grad_weight, grad_bias = grads
    return (
        grad,
        grad_codes if codes else None,
        grad_weight if phi else None,
        grad_bias if phi else None,
        None,
        None,
    )


implement(
    "residual_step",
    "residual_step(Tensor f_hat, Tensor embedding, Tensor phi_weight, Tensor phi_bias, "
    "SymInt[] next_size, float ratio) -> (Tensor, Tensor)",
    native=_native,
    fallback=_composed,
    fake=_fake,
)
implement(
    "residual_step",
    "residual_step_backward(Tensor grad, Tensor embedding, Tensor phi_weight, float ratio, bool codes, "
    "bool phi) -> (Tensor, Tensor, Tensor)",
    native=_native_backward,
    fallback=_composed_backward,
    fake=_fake_backward,
)
differentiate("residual_step", _gradient, _setup_context)


def residual_step(
    f_hat: Tensor,
    embedding: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    *,
    next_size: int | tuple[int, int] | None = None,
    ratio: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """f_hat + phi(upsample(embedding)), and its area-downsample at the next scale's size (paper, Algorithm 2).

    phi(x) = (1 - ratio) x + ratio conv3x3(x). Codes of the same size as f_hat are not resampled.

    Args:
        f_hat: (B, C, H, W), the sum of the scales so far; not changed. float32; float64, bfloat16 and
            float16 have no kernel and run as plain PyTorch.
        embedding: (B, C, h, w), codes of this scale, or mixtures of codes.
        phi_weight, phi_bias: (C, C, 3, 3) and (C,).
        next_size: side or (h, w) of the next scale; None at the last one.
        ratio: weight of the convolution in phi.

    Returns:
        the new f_hat, (B, C, H, W), and the next scale's input, (B, C, *next_size); the new f_hat itself for None.

    Raises:
        ValueError: shapes do not match, or tensors lie on different devices.
        TypeError: dtypes differ or are not supported.
    """
    op = "residual_step"
    check_shape(op, "f_hat", f_hat, "(B, C, H, W)", None, None, None, None)
    batch, channels = f_hat.shape[:2]
    check_shape(op, "embedding", embedding, "(B, C, h, w)", batch, channels, None, None)
    require(
        min(embedding.shape[2:]) >= 1, op, "embedding must have a row and a column", tuple(embedding.shape)
    )
    check_shape(op, "phi_weight", phi_weight, "(C, C, 3, 3)", channels, channels, 3, 3)
    check_shape(op, "phi_bias", phi_bias, "(C,)", channels)
    check_dtype(op, "f_hat", f_hat, FLOATS)
    check_together(op, f_hat=f_hat, embedding=embedding, phi_weight=phi_weight, phi_bias=phi_bias)
    size = None if next_size is None else as_size(op, next_size)
    if backend.current() == "reference":
        return reference.residual_step(f_hat, embedding, phi_weight, phi_bias, next_size=size, ratio=ratio)
    new, pooled = torch.ops.var_ext.residual_step.default(
        f_hat, embedding, phi_weight, phi_bias, size or (), ratio
    )
    return new, new if size is None else pooled
