"""Registration of ops with `torch.library`: schema, implementation for each device, fake, autograd.

Each op is an opaque call with a fake: CPU and CUDA get the native kernel where this build has one, else a fallback in
plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from var_ext import _torch, backend

_LIBRARY = torch.library.Library("var_ext", "DEF")
Body = Callable[..., Any]


def implement(
    op: str, schema: str, *, native: Body | None, fallback: Body, fake: Body, float64: bool = True
) -> None:
    """Register one callable of `op` (its forward, its backward...) for CPU and CUDA.

    Args:
        native: calls the kernel; None where none exists on any device.
        float64: whether the kernel takes float64. If not, such calls, known by their first tensor, take the
            fallback: they serve checks of gradients.
    """
    _LIBRARY.define(schema)
    name = _name(schema)
    for device in backend.DEVICES:
        body = native if native is not None and device in backend.kernel_devices(op) else fallback
        if body is native and not float64:
            body = _unless_float64(body, fallback)
        _LIBRARY.impl(name, body, device.upper())
    torch.library.register_fake(f"var_ext::{name}", fake, lib=_LIBRARY)


def _unless_float64(native: Body, fallback: Body) -> Body:
    def body(x: torch.Tensor, *rest: Any) -> Any:
        return fallback(x, *rest) if x.dtype == torch.float64 else native(x, *rest)

    return body


def differentiate(
    name: str, backward: Body, setup_context: Body, *, twice: bool = False, jvp: Body | None = None
) -> None:
    """Attach the gradient of a registered op.

    What `torch.library.register_autograd` does, without its bookkeeping of keyword arguments: calls are cheaper.

    Args:
        backward: (ctx, *gradients of the outputs) -> gradient of each input.
        setup_context: (ctx, inputs, output), saves what `backward` needs.
        twice: whether `backward` is made of differentiable ops; if not, a second derivative is an error.
        jvp: (ctx, tangent of each input) -> tangent of the output, with what was saved for forward mode; without it
            forward mode is an error, as it is everywhere below `torch.library.register_autograd`.
    """
    backward = backward if twice else once_differentiable(backward)
    below_autograd = _torch.below_autograd
    if below_autograd is None:
        torch.library.register_autograd(
            f"var_ext::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )
        return
    op = getattr(torch.ops.var_ext, name).default

    def forward(ctx: Any, *inputs: Any) -> Any:
        with below_autograd():
            output = op(*inputs)
        setup_context(ctx, inputs, output)
        return output

    rules = {"forward": forward, "backward": backward, **({} if jvp is None else {"jvp": jvp})}
    node: Any = type(
        f"{name}_node", (torch.autograd.Function,), {rule: staticmethod(rules[rule]) for rule in rules}
    )

    def call(*inputs: Any) -> Any:
        # a node without a forward mode says so; without a node, tangents would be lost in silence
        wanted = torch.is_grad_enabled() and _torch.any_requires_grad(*inputs)
        if wanted or _torch.forward_mode():
            return node.apply(*inputs)
        with below_autograd():
            return op(*inputs)

    _LIBRARY.impl(name, call, "Autograd")


def _name(schema: str) -> str:
    return schema.split("(", 1)[0].strip()
