"""Cross-entropy of every token in training: one pass over the logits for the loss, and one for their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from var_ext import _torch, backend, reference
from var_ext.ops._checks import check_dtype, check_shape, check_together, require
from var_ext.ops._native import kernels, view
from var_ext.ops._registry import differentiate, implement


def _fake(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    return logits.new_empty(targets.shape), logits.new_empty((targets.numel(), 2))


def _check_targets(logits: Tensor, targets: Tensor) -> None:
    if targets.numel():
        least, most = (int(t) for t in targets.aminmax())
        wanted = f"targets must be in 0..V-1 = 0..{logits.shape[-1] - 1}"
        require(least >= 0 and most < logits.shape[-1], "cross_entropy", wanted, f"{least}..{most}")


def _native(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    _check_targets(logits, targets)  # here, where a compiled pass has numbers too
    losses, stats = _fake(logits, targets, smoothing)
    logits, targets = logits.contiguous(), targets.contiguous()
    kernels(logits).cross_entropy(view(logits), view(targets), view(losses), view(stats), smoothing)
    return losses, stats


def _native_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, stats: Tensor, smoothing: float
) -> Tensor:
    _check_targets(logits, targets)
    grad, logits, targets = grad.contiguous(), logits.contiguous(), targets.contiguous()
    out = torch.empty_like(logits)
    kernel: Any = kernels(logits).cross_entropy_backward
    kernel(view(grad), view(logits), view(targets), view(stats), view(out), smoothing)
    return out


def _reference(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    losses = reference.cross_entropy(logits, targets, smoothing=smoothing)
    flat = logits.reshape(-1, logits.shape[-1])
    return losses, torch.stack((flat.amax(-1), (flat - flat.amax(-1, keepdim=True)).logsumexp(-1)), dim=-1)


def _reference_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, stats: Tensor, smoothing: float
) -> Tensor:
    hit = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    hit.scatter_(-1, targets[..., None], 1 - smoothing)
    largest, log = stats.view(*targets.shape, 2)[..., None, :].unbind(-1)
    return grad[..., None] * ((logits - largest - log).exp() - hit - smoothing / logits.shape[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.smoothing = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, grad: Tensor, grad_stats: Tensor) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.var_ext.cross_entropy_backward.default
    return gradient(grad, *ctx.saved_tensors, ctx.smoothing), None, None


implement(
    "cross_entropy",
    "cross_entropy(Tensor logits, Tensor targets, float smoothing) -> (Tensor, Tensor)",
    native=_native,
    fallback=_reference,
    fake=_fake,
    float64=False,
)
implement(
    "cross_entropy",
    "cross_entropy_backward(Tensor grad, Tensor logits, Tensor targets, Tensor stats, float smoothing) -> Tensor",
    native=_native_backward,
    fallback=_reference_backward,
    fake=lambda grad, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
    float64=False,
)
differentiate("cross_entropy", _gradient, _setup_context)


def cross_entropy(logits: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Losses in nats, -(1 - s) log p(target) - s mean(log p), where p is the softmax of the logits.

    Section 7 of arXiv 1512.00567. On a GPU it is torch's.

    Args:
        logits: (..., V), float32 or float64.
        targets: (...) int64 in 0..V-1.
        smoothing: s, share of the weight that all V classes divide among themselves, in [0, 1].

    Returns:
        (..., ), dtype of the logits, contiguous.

    Raises:
        ValueError: shapes do not match, tensors lie on different devices, the smoothing is not in [0, 1], or (on a
            CPU; elsewhere it would sync) a target is out of range.
        TypeError: a dtype is not supported.
    """
    op = "cross_entropy"
    check_dtype(op, "logits", logits, (torch.float32, torch.float64))
    check_shape(op, "logits", logits, "(..., V)", *[None] * max(1, logits.ndim))
    check_shape(op, "targets", targets, "(...)", *logits.shape[:-1])
    check_dtype(op, "targets", targets, (torch.int64,))
    check_together(op, same_dtype=False, logits=logits, targets=targets)
    require(0 <= smoothing <= 1, op, "smoothing must be in [0, 1]", smoothing)
    if not backend.use_native("cross_entropy", logits.device.type) or _torch.under_transforms():
        # torch's own, its gradient too
        if targets.device.type == "cpu" and not (torch.compiler.is_compiling() or _torch.under_transforms()):
            _check_targets(logits, targets)
        return reference.cross_entropy(logits, targets, smoothing=smoothing)
    losses, _ = torch.ops.var_ext.cross_entropy.default(logits, targets, float(smoothing))
    return losses
