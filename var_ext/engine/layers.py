"""Linear layers and convolutions with weights cast, packed or quantized once. Matmuls and convolutions are torch's own:
oneDNN, cuBLAS, cuDNN.

Packed layers sum in an order that does not depend on the number of rows, so an image does not depend on its batch.
Unpacked float32 layers differ in the last bits between few and many rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from var_ext import _torch, ops
from var_ext.engine.precision import Precision
from var_ext.models.modules import upsampling_taps

Run = Callable[[Tensor, Tensor | None], Tensor]  # of an input and a bias

ROWS = 64  # for which oneDNN packs weights; the layout is the same for any number


class Layer(Protocol):
    """Replaces a linear layer or a convolution; its output is new memory. Only linear layers have `gelu`, only
    convolutions `without_bias`."""

    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """(..., N) -> (..., M), or (B, C, H, W) -> (B, C', H', W'), in `dtype`."""
        ...


class Dense:
    """A linear layer (..., N) -> (..., M) with its weight cast."""

    affine = True  # linear: mixing inputs mixes outputs

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.bias, self.dtype = bias, dtype
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x.to(self.dtype), self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU (tanh) of the output: the bias is added with the activation, on a GPU in 16 bits inside the matmul."""
        x = x.to(self.dtype)
        if self.bias is not None and _fuses_gelu(self.weight):
            y = _torch.addmm_gelu(self.bias, x.flatten(0, -2), self.weight.t(), use_gelu=True)
            return y.unflatten(0, x.shape[:-1])
        y = self.product(x, None)
        return F.gelu(y, approximate="tanh") if self.bias is None else ops.bias_gelu(y, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias."""
        return _product(x, self.weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.ndim > 2 and on_gpu(weight):  # with more axes torch may add the bias separately
        return F.linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    return F.linear(x, weight, bias)


def on_gpu(tensor: Tensor) -> bool:
    """Whether layers run where kernel launches are costly."""
    return tensor.is_cuda


def _fuses_gelu(weight: Tensor) -> bool:
    """Whether torch makes one kernel of product, bias and GELU: cublasLt's epilogue, whose GELU is the tanh form, as is
    that of torch's own CUDA fallback. On a CPU the same function means the erf form."""
    known = _torch.addmm_gelu is not None
    return known and on_gpu(weight) and weight.dtype in (torch.bfloat16, torch.float16)


class PackedLinear(Dense):
    """oneDNN's matmul with a weight (M, N) packed for its kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        packed = _torch.reorder_linear_weight(weight.contiguous(), ROWS)
        super().__init__(packed, bias, dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.numel() == x.shape[-1] and x.dtype == torch.float32:
            # one row uses another kernel, which sums differently
            return self.product(x.expand(2, *x.shape), bias)[0]
        return _torch.linear_pointwise(x, self.weight, bias, "none", [], "")


class Int8Linear(Dense):
    """oneDNN's matmul of 8-bit integers: one scale per row of the weight (M, N), and per token."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        weight = weight.float()
        self.scale = (weight.abs().amax(dim=1) / 127).clamp_min(1e-30)  # (M,)
        quantized = (weight / self.scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.zero_points = torch.zeros_like(self.scale, dtype=torch.int64)
        packed = _torch.qlinear_prepack(quantized, [ROWS, weight.shape[1]])
        super().__init__(packed, bias, dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        codes, scale = ops.quantize_rows(x)  # (..., N) uint8 around 128, (..., 1)
        y = _torch.qlinear_pointwise(
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
        scale = scale.to(self.dtype)  # exact: scales are representable in bfloat16
        return y.mul_(scale) if bias is None else torch.addcmul(bias, y, scale, out=y)


def linear(
    module: nn.Linear, precision: Precision, *, pack: bool, free: bool = False, int8: bool = False
) -> Dense:
    """A plain `nn.Linear` in `precision`.

    Args:
        pack: keep a copy of the weight packed for oneDNN (CPU); else use the weight, cast if needed.
        free: free the module's own weight once there is a copy.
        int8: allow quantization if the precision asks for it.
    """
    weight, bias = _own_weight(module), _bias(module, precision)
    layer: Dense
    if precision.int8 and int8:
        layer = Int8Linear(weight, bias, precision.dtype)
    elif pack and weight.device.type == "cpu" and _has_packed_layers(precision.dtype):
        layer = PackedLinear(weight.to(precision.dtype), bias, precision.dtype)
    else:
        layer = Dense(weight.to(precision.dtype), bias, precision.dtype)
        free = free and layer.weight is not weight
    if free:
        _let_go(module)
    return layer


def _own_weight(module: nn.Linear | nn.Conv2d) -> Tensor:
    weight = module.weight.detach()
    if not weight.numel():
        raise RuntimeError(
            "the weight of a layer is gone: it was released by another sampler, or for another layer that shares it; "
            "load the model again, and draw without release=True"
        )
    return weight


def _let_go(module: nn.Linear | nn.Conv2d) -> None:
    module.weight.data = module.weight.data.new_empty(0)


def _has_packed_layers(dtype: torch.dtype) -> bool:
    known = (torch.float32, torch.bfloat16, torch.float16)
    return dtype in known and torch.backends.mkldnn.is_available() and _torch.packs_layers()


class Norm:
    """A GroupNorm (B, C, H, W) -> (B, C, H, W) with its weight and bias cast."""

    def __init__(self, module: nn.GroupNorm, dtype: torch.dtype) -> None:
        self.groups, self.eps, self.dtype = module.num_groups, module.eps, dtype
        self.weight, self.bias = module.weight.detach().to(dtype), module.bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)

    def silu(self, x: Tensor, input_bias: Tensor | None) -> Tensor:
        """SiLU of that of x + input_bias (C,)."""
        return ops.group_norm_silu(
            x, self.weight, self.bias, groups=self.groups, eps=self.eps, input_bias=input_bias
        )


def unchanged(x: Tensor) -> Tensor:
    """What dropout is outside training."""
    return x


class Sized:
    """A convolution packed for the size of its first input; other sizes work as well.

    Its output is new memory, which the caller may write.

    Args:
        lay_out: packs it for feature maps of H = W = `side`.
    """

    output_is_new = True

    def __init__(self, lay_out: Callable[[int], Run], bias: Tensor | None, dtype: torch.dtype) -> None:
        self._lay_out, self.bias, self.dtype = lay_out, bias, dtype
        self._run: Run | None = None

    def __call__(self, x: Tensor) -> Tensor:
        run = self._run or self._first_run
        return run(x if x.dtype == self.dtype else x.to(self.dtype), self.bias)

    def without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Its output (B, C', H', W') before the bias, and the bias (C',); or all of it and None where that is free."""
        if self.bias is None or not adds_bias_apart(x):
            return self(x), None
        run = self._run or self._first_run
        return run(x.to(self.dtype), None), self.bias

    def _first_run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # usable inside and outside inference mode
            self._run = run = self._lay_out(x.shape[-1])
        return run(x, bias)


def adds_bias_apart(x: Tensor) -> bool:
    """Whether adding a convolution's bias takes a separate pass over memory: with cuDNN it does, oneDNN fuses it.

    The fused replacement has no gradient.
    """
    return x.is_cuda and not (torch.is_grad_enabled() and x.requires_grad)


def convolution(module: nn.Conv2d, *, precision: Precision, pack: bool, free: bool) -> Layer:
    """A plain `nn.Conv2d` in `precision`, channels last; `pack` and `free` as for `linear`.

    On a GPU a 1x1 convolution is a linear layer over the channels, which adds the bias itself.
    """
    dtype = precision.dtype
    geometry: Any = (module.padding, module.stride, module.dilation, module.groups)
    ones = module.kernel_size == module.stride == (1, 1) and module.padding == (0, 0)
    pointwise = ones and module.groups == 1

    def lay_out(side: int) -> Run:
        own = _own_weight(module)
        weight, where = own.to(dtype), own.device.type
        packs = pack and where == "cpu" and _has_packed_layers(dtype)
        if packs or where == "cuda":  # else cuDNN would convert it at each call
            weight = weight.contiguous(memory_format=torch.channels_last)
        run: Run
        if packs:
            shape = [1, weight.shape[1] * module.groups, side, side]
            packed = _torch.reorder_convolution_weight(weight, *geometry, shape)
            rest: Any = (*geometry, "none", [], "")
            run = lambda x, bias: _torch.convolution_pointwise(x, packed, bias, *rest)  # noqa: E731
        elif pointwise and on_gpu(weight):
            run = lambda x, bias: _product(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)  # noqa: E731
        else:
            padding, stride, dilation, groups = geometry
            run = lambda x, bias: F.conv2d(x, weight, bias, stride, padding, dilation, groups)  # noqa: E731
        if free and (packs or weight.data_ptr() != own.data_ptr()):
            _let_go(module)
        return run

    return Sized(lay_out, _bias(module, precision), dtype)


def upsampling(module: nn.Conv2d, *, precision: Precision, pack: bool, free: bool) -> Layer:
    """Nearest-neighbour x2 and a plain 3x3 convolution as one transposed 4x4 convolution: 16 of 36 multiplications.

    Args:
        pack, free: as for `linear`; without `pack` taps are summed at each call and no copy is kept.
    """
    dtype = precision.dtype

    def taps() -> Tensor:  # (C_in, C_out, 4, 4), summed in float32
        spread = upsampling_taps(_own_weight(module).float())
        layout = torch.channels_last if spread.is_cuda else torch.contiguous_format
        return spread.to(dtype).clone(memory_format=layout)

    def lay_out(side: int) -> Run:
        if not pack:
            return lambda x, bias: F.conv_transpose2d(x, taps(), bias, stride=2, padding=1)
        weight = taps()
        if free:
            _let_go(module)
        if weight.device.type == "cpu" and _has_packed_layers(dtype):
            shape = [1, weight.shape[0], side, side]
            ones, twos, none = [1, 1], [2, 2], [0, 0]
            packed = _torch.reorder_transposed_weight(weight, ones, none, twos, ones, 1, shape)
            rest: Any = (ones, none, twos, ones, 1, "none", [], "")
            return lambda x, bias: _torch.transposed_pointwise(x, packed, bias, *rest)
        return lambda x, bias: F.conv_transpose2d(x, weight, bias, stride=2, padding=1)

    return Sized(lay_out, _bias(module, precision), dtype)


def _bias(module: nn.Linear | nn.Conv2d, precision: Precision) -> Tensor | None:
    return None if module.bias is None else module.bias.detach().to(precision.dtype)
