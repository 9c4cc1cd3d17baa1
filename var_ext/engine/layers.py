"""Linear layers and convolutions with weights cast, packed or quantized once. The products are torch's own: oneDNN,
cuBLAS, cuDNN.

Packed layers add up in an order that does not depend on how many rows there are, so an image does not depend on its
batch. Unpacked float32 ones differ in the last bits between few and many rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from var_ext import ops
from var_ext.engine.precision import Precision

Layer = Callable[[Tensor], Tensor]
ROWS = 64  # for which oneDNN is asked to lay out weights; with any other number the layout is the same


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of `module` does what its class says and nothing else: no subclass (an adapter, a quantized layer)
    and no hooks. Only then may its parameters be used without calling it."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return type(module) is kind and not any(hooks)


def linear(
    module: nn.Module,
    precision: Precision,
    *,
    pack: bool,
    free: bool = False,
    bias: bool = True,
    int8: bool = True,
) -> Layer:
    """A layer (..., N) -> (..., M) in `precision`, from an `nn.Linear` or what stands in its place.

    Args:
        pack: keep a copy of the weight laid out for oneDNN (CPU); else use the weight, cast if need be.
        free: let go of the module's own weight once there is a copy.
        bias: add it; False where the caller does.
        int8: let it be quantized if the precision says so.
    """
    if not is_plain(module, nn.Linear):
        assert bias, "the bias of a layer that has to be called cannot be left out"
        return Called(module, precision.dtype)
    assert isinstance(module, nn.Linear)
    weight, own = module.weight.detach(), module.bias if bias else None
    added = None if own is None else own.detach().to(precision.dtype)
    layer: Layer
    if precision.int8 and int8:
        layer = Int8Linear(weight, added, precision.dtype)
    elif pack and weight.device.type == "cpu" and _has_packed_layers(precision.dtype):
        layer = PackedLinear(weight.to(precision.dtype), added)
    else:
        cast = weight.to(precision.dtype)
        free, layer = free and cast is not weight, lambda x: F.linear(x, cast, added)
    if free:
        _let_go(module)
    return layer


def _let_go(module: nn.Linear | nn.Conv2d) -> None:
    module.weight.data = module.weight.data.new_empty(0)


def _has_packed_layers(dtype: torch.dtype) -> bool:
    known = (torch.float32, torch.bfloat16, torch.float16)
    return (
        dtype in known
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class Called:
    """A module that has to be called as it is, in the dtype of its own weights."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype

    def __call__(self, x: Tensor) -> Tensor:
        own = next(self.module.parameters(), x).dtype
        with torch.autocast(x.device.type, enabled=False):
            return self.module(x.to(own)).to(self.dtype)


class PackedLinear:
    """oneDNN's product with a weight (M, N) that lies in memory as its kernel reads it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if (
            x.numel() == x.shape[-1] and x.dtype == torch.float32
        ):  # one row takes another kernel with other sums
            return self(x.expand(2, *x.shape))[0]
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Linear:
    """oneDNN's product of 8-bit integers: a scale for each row of the weight (M, N), and for each token."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        weight = weight.float()
        self.scale = (weight.abs().amax(dim=1) / 127).clamp_min(1e-30)  # (M,)
        quantized = (weight / self.scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(quantized, [ROWS, weight.shape[1]])
        self.zero_points = torch.zeros_like(self.scale, dtype=torch.int64)
        self.bias, self.dtype = bias, dtype

    def __call__(self, x: Tensor) -> Tensor:
        codes, scale = ops.quantize_rows(x)  # (..., N) uint8 around 128, (..., 1)
        y = torch.ops.onednn.qlinear_pointwise(
            codes,
            1.0,
            128,
            self.weight,
            self.scale,
            self.zero_points,
            None,
            1.0,
            0,
            self.dtype,
            "none",
            [],
            "",
        )
        scale = scale.to(self.dtype)  # exact: scales are bfloat16 numbers
        return y.mul_(scale) if self.bias is None else torch.addcmul(self.bias, y, scale, out=y)


def convolution(
    module: nn.Conv2d, precision: Precision, *, pack: bool, free: bool = False, side: int
) -> Layer:
    """A convolution (B, C, H, W) -> (B, C', H', W') in `precision`, channels last, from an `nn.Conv2d` or what stands
    in its place.

    Args:
        pack, free: as for `linear`.
        side: H and W for which oneDNN is asked to lay out the weight; other sizes work as well.
    """
    if not is_plain(module, nn.Conv2d):
        return Called(module, precision.dtype)
    own, bias = module.weight.detach(), _bias(module, precision)
    weight, where = own.to(precision.dtype), own.device.type
    geometry: Any = (module.padding, module.stride, module.dilation, module.groups)
    layer: Layer
    if pack and where == "cpu" and _has_packed_layers(weight.dtype):
        shape = [1, weight.shape[1] * module.groups, side, side]
        weight = weight.contiguous(memory_format=torch.channels_last)
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, shape)
        rest: Any = (bias, *geometry, "none", [], "")
        layer = lambda x: torch.ops.mkldnn._convolution_pointwise(x, packed, *rest)  # noqa: E731
    else:
        if where == "cuda":  # cuDNN would bring it to this layout at each call
            weight = weight.contiguous(memory_format=torch.channels_last)
        kept, (padding, stride, dilation, groups) = weight, geometry
        free = free and kept.data_ptr() != own.data_ptr()
        layer = lambda x: F.conv2d(x, kept, bias, stride, padding, dilation, groups)  # noqa: E731
    if free:
        _let_go(module)
    return layer


def spread_taps(weight: Tensor, dim: int) -> Tensor:
    """Three taps along `dim` over doubled pixels -> the four places that one pixel reaches, nearest edge first."""
    before, here, after = weight.unbind(dim)
    return torch.stack([after, here + after, before + here, before], dim)


def upsampling(
    module: nn.Conv2d, precision: Precision, *, pack: bool, free: bool = False, side: int
) -> Layer:
    """Nearest-neighbour x2 and a 3x3 convolution as one transposed 4x4 convolution: 16 of 36 products.

    Args:
        pack, free, side: as for `convolution`; `side` before doubling.
    """
    if not is_plain(module, nn.Conv2d):
        called = Called(module, precision.dtype)
        return lambda x: called(F.interpolate(x, scale_factor=2, mode="nearest"))
    bias = _bias(module, precision)

    def taps() -> Tensor:  # (C_in, C_out, 4, 4), added up in float32
        spread = spread_taps(spread_taps(module.weight.detach().float(), 2), 3).transpose(0, 1)
        layout = torch.channels_last if spread.is_cuda else torch.contiguous_format
        return spread.to(precision.dtype).clone(memory_format=layout)

    if not pack:  # no copy that outlasts the call
        return lambda x: F.conv_transpose2d(x, taps(), bias, stride=2, padding=1)
    weight = taps()
    if free:
        _let_go(module)
    if weight.device.type == "cpu" and _has_packed_layers(weight.dtype):
        shape = [1, weight.shape[0], side, side]
        ones, twos, none = [1, 1], [2, 2], [0, 0]
        packed = torch.ops.mkldnn._reorder_convolution_transpose_weight(
            weight, ones, none, twos, ones, 1, shape
        )
        rest: Any = (bias, ones, none, twos, ones, 1, "none", [], "")
        return lambda x: torch.ops.mkldnn._convolution_transpose_pointwise(x, packed, *rest)
    return lambda x: F.conv_transpose2d(x, weight, bias, stride=2, padding=1)


def _bias(module: nn.Conv2d, precision: Precision) -> Tensor | None:
    return None if module.bias is None else module.bias.detach().to(precision.dtype)
