"""Registration of ops with `torch.library`: schema, implementation for each device, fake, autograd.

An op is registered in one of two ways. With `implement`, as an opaque call with a fake: CPU and CUDA get the native
kernel where this build has one, else the fallback in plain PyTorch. With `compose`, as its reference, through
which autograd and compilers see: the way of a differentiable op whose kernels are still owed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from var_ext import backend

_LIBRARY = torch.library.Library("var_ext", "DEF")
Body = Callable[..., Any]


def compose(schema: str, body: Body) -> None:
    """Register an op whose body is plain PyTorch all the way down."""
    _LIBRARY.define(schema)
    _LIBRARY.impl(_name(schema), body, "CompositeImplicitAutograd")


def implement(op: str, schema: str, *, native: Body | None, fallback: Body, fake: Body) -> None:
    """Register one callable of `op` (its forward, its backward...) for CPU and CUDA."""
    _LIBRARY.define(schema)
    name = _name(schema)
    for device in backend.DEVICES:
        has_kernel = native is not None and device in backend.kernel_devices(op)
        _LIBRARY.impl(name, native if has_kernel else fallback, device.upper())
    torch.library.register_fake(f"var_ext::{name}", fake, lib=_LIBRARY)


def differentiate(name: str, backward: Body, setup_context: Body) -> None:
    """Attach the gradient of a registered op."""
    torch.library.register_autograd(f"var_ext::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def _name(schema: str) -> str:
    return schema.split("(", 1)[0].strip()
