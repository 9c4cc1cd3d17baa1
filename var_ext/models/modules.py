"""Small modules of both models, and how they call their layers.

A layer is an `nn.Linear` or `nn.Conv2d`, a user's replacement, or an engine's: the same weight cast, packed or in 8
bits. The functions here accept all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from var_ext import _torch, backend, ops
from var_ext.models.keyed import Draws

_NOTHING = object()


class Part(nn.Module):
    """A module of this package's models: an engine may run a copy of it, rebuilt when an attribute is set."""

    quantizable = False  # whether the linear layers inside may be run in 8 bits
    changes = 0  # of attributes so far

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "training" and self.__dict__.get(name, _NOTHING) is not value:
            self.__dict__["changes"] = self.changes + 1
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self.__dict__["changes"] = self.changes + 1
        super().__delattr__(name)


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a call of `module` does what its class says and nothing else: no subclass (an adapter, a quantized layer,
    a parametrization), no hooks, no forward of its own. Only then may its parameters be used without calling it."""
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    return not any(_torch.hooks_of(module))


def dtype_of(layer: Any) -> torch.dtype:
    """The dtype a layer computes in: an engine's layer states it, any other uses that of its parameters."""
    if not isinstance(layer, nn.Module):
        return layer.dtype
    if "runs_in" in layer.__dict__:  # an engine's copy
        return layer.__dict__["runs_in"]
    return next(parameter.dtype for parameter in layer.parameters())


def _engines(layer: Any, name: str) -> Any:
    """A method that an engine's layer has beside a call, or None. Its class is asked: a user's layer in an engine's
    wrapper would answer for itself."""
    return None if isinstance(layer, nn.Module) else getattr(type(layer), name, None)


ROWS = 128  # of fewer, laying out the weight costs more than a faster product gains


def _precision_here(layer: Any, x: Tensor) -> torch.dtype | None:
    """The precision in which `ops.linear` computes a layer of x, or None: then the layer is called.

    It does for a plain layer on a CPU whose products it makes faster than torch, in training as in validation.
    """
    if not is_plain(layer, nn.Linear) or x.numel() < ROWS * x.shape[-1]:
        return None
    device, weight, precision = x.device.type, layer.weight, x.dtype
    if torch.is_autocast_enabled(device):
        precision = torch.get_autocast_dtype(device)
    elif weight.dtype != precision:
        return None
    fits = {x.dtype, weight.dtype, precision} <= {torch.float32, torch.bfloat16}
    if not fits or torch.compiler.is_compiling() or _torch.under_transforms():
        return None
    return precision if backend.multiplies(device, bf16=precision == torch.bfloat16) else None


def linear(layer: Any, x: Tensor) -> Tensor:
    """layer(x): (..., N) -> (..., M)."""
    precision = _precision_here(layer, x)
    return layer(x) if precision is None else ops.linear(x.to(precision), layer.weight, layer.bias)


def linear_float32(layer: Any, x: Tensor) -> Tensor:
    """layer(x).float(), without a copy in the precision of autocast where that can be had."""
    precision = _precision_here(layer, x)
    if precision is None:
        return layer(x).float()
    return ops.linear(x.float(), layer.weight, layer.bias, precision=precision)


def linear_gelu(layer: Any, x: Tensor) -> Tensor:
    """GELU (tanh) of a linear layer (..., N) -> (..., M): the bias is added with the activation where possible."""
    gelu = _engines(layer, "gelu")
    if gelu is not None:
        return gelu(layer, x)
    if is_plain(layer, nn.Linear) and layer.bias is not None:
        precision = _precision_here(layer, x)
        h = F.linear(x, layer.weight) if precision is None else ops.linear(x.to(precision), layer.weight)
        return ops.bias_gelu(h, layer.bias.to(h.dtype))
    return F.gelu(layer(x), approximate="tanh")


def without_bias(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """layer(x) without its bias, and the bias, where adding it takes a separate pass: an engine's convolution on a GPU.
    For any other layer the whole output, and None."""
    split = _engines(layer, "without_bias")
    return (layer(x), None) if split is None else split(layer, x)


def norm_silu(norm: Any, x: Tensor, input_bias: Tensor | None = None) -> Tensor:
    """SiLU of a GroupNorm of x + input_bias: (B, C, H, W), (C,) or None -> (B, C, H, W)."""
    silu = _engines(norm, "silu")
    if silu is not None:
        return silu(norm, x, input_bias)
    if not is_plain(norm, nn.GroupNorm) or norm.weight is None:
        return F.silu(norm(x if input_bias is None else x + input_bias[:, None, None]))
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return ops.group_norm_silu(x, weight, bias, groups=norm.num_groups, eps=norm.eps, input_bias=input_bias)


def plus(layer: Any, h: Tensor, x: Tensor) -> Tensor:
    """layer(h) + x; in place if the layer is an engine's, whose output nothing else references."""
    y, bias = without_bias(layer, h)
    if bias is not None:
        return ops.bias_residual(y, x.to(y.dtype), bias, in_place=True)
    return y.add_(x) if _engines(layer, "output_is_new") else x + y


def spread_taps(weight: Tensor, dim: int) -> Tensor:
    """Three taps along `dim` over doubled pixels -> the four places that one pixel reaches, nearest edge first."""
    before, here, after = weight.unbind(dim)
    return torch.stack([after, here + after, before + here, before], dim)


def upsampling_taps(weight: Tensor) -> Tensor:
    """3x3 taps over doubled pixels (C_out, C_in, 3, 3) -> those of one transposed convolution (C_in, C_out, 4, 4)."""
    return spread_taps(spread_taps(weight, 2), 3).transpose(0, 1)


class Dropout(nn.Dropout):
    """`nn.Dropout` with 16 random bits per element on the CPU, where torch draws a whole number for each on one thread.

    The rate is rounded to a multiple of 2^-16.
    """

    draws: Draws | None = None  # where a trainer keys the rows

    def forward(self, x: Tensor) -> Tensor:
        kept = round((1 - self.p) * 2**16)  # of 2^16
        if self.draws is not None and self.training and kept not in (0, 2**16):
            return ops.keyed_dropout(x, self.draws.rows.keys, self.draws.counter, kept)
        traced = torch.compiler.is_compiling() or _torch.under_transforms()
        if not self.training or self.inplace or x.device.type != "cpu" or kept in (0, 2**16) or traced:
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        mask = bits.view(torch.int16)[: x.numel()].view(x.shape) < kept - 2**15
        return (x * mask).mul_(2**16 / kept)


class DropPath(Part):
    """Stochastic depth: drops the residual branch of whole samples by zeroing its gate (B, C).

    Where the rows are keyed, the model has done that for all blocks at once (`VAR.drop_paths`).
    """

    keyed = False

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, gate: Tensor) -> Tensor:
        if self.keyed or self.rate == 0.0 or not self.training:
            return gate
        kept = gate.new_empty(gate.shape[0], 1).bernoulli_(1 - self.rate)
        return gate * kept / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"
