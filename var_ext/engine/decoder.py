"""The decoder of a sampling: channels last, weights cast and taps of upsampling added up once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from var_ext import ops
from var_ext.engine.layers import Layer, convolution, is_plain
from var_ext.engine.precision import Precision


class Decoder:
    """f_hat (B, C, P, P) float32 -> images (B, 3, S, S) float32 in [0, 1]; a tokenizer with the published names."""

    def __init__(self, vae: Any, precision: Precision) -> None:
        decoder, self.dtype = vae.decoder, precision.dtype
        self.steps: list[Layer] = [
            convolution(vae.post_quant_conv, precision),
            convolution(decoder.conv_in, precision),
            _resnet(decoder.mid.block_1, precision),
            _attention(decoder.mid.attn_1, precision),
            _resnet(decoder.mid.block_2, precision),
        ]
        for level in reversed(decoder.up):
            for n, block in enumerate(level.block):
                self.steps.append(_resnet(block, precision))
                if len(level.attn):
                    self.steps.append(_attention(level.attn[n], precision))
            if hasattr(level, "upsample"):
                self.steps.append(_upsample(level.upsample.conv, precision))
        self.steps += [_norm_silu(decoder.norm_out, precision), convolution(decoder.conv_out, precision)]

    def __call__(self, f_hat: Tensor) -> Tensor:
        h = f_hat.to(self.dtype, memory_format=torch.channels_last)
        for step in self.steps:
            h = step(h)
        # to float32 first: 8 bits hold images in [-1, 1] twice as finely as bfloat16 does
        return h.float().clamp_(-1, 1).add_(1).mul_(0.5).contiguous()


def _norm_silu(norm: nn.GroupNorm, precision: Precision) -> Layer:
    weight, bias = (p.detach().to(precision.dtype) for p in (norm.weight, norm.bias))
    groups, eps = norm.num_groups, norm.eps
    return lambda x: ops.group_norm_silu(x, weight, bias, groups=groups, eps=eps)


def _resnet(block: Any, precision: Precision) -> Layer:
    norm1, norm2 = _norm_silu(block.norm1, precision), _norm_silu(block.norm2, precision)
    conv1, conv2 = convolution(block.conv1, precision), convolution(block.conv2, precision)
    plain = isinstance(block.nin_shortcut, nn.Identity)
    shortcut: Callable[[Tensor], Tensor] | None = (
        None if plain else convolution(block.nin_shortcut, precision)
    )

    def run(x: Tensor) -> Tensor:
        h = conv2(norm2(conv1(norm1(x))))
        return h.add_(x if shortcut is None else shortcut(x))

    return run


def _attention(block: Any, precision: Precision) -> Layer:
    norm, dtype = block.norm, precision.dtype
    weight, bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)
    qkv, proj = convolution(block.qkv, precision), convolution(block.proj_out, precision)

    def run(x: Tensor) -> Tensor:
        h = qkv(F.group_norm(x, norm.num_groups, weight, bias, norm.eps))
        q, k, v = h.flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)  # (B, 1, H*W, C) each
        out = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, H*W, C)
        return proj(out.transpose(1, 2).unflatten(2, x.shape[2:])).add_(x)

    return run


def spread_taps(weight: Tensor, dim: int) -> Tensor:
    """Three taps along `dim` over doubled pixels -> the four places that one pixel reaches, nearest edge first."""
    before, here, after = weight.unbind(dim)
    return torch.stack([after, here + after, before + here, before], dim)


def _upsample(conv: nn.Conv2d, precision: Precision) -> Layer:
    """Nearest-neighbour x2 and a 3x3 convolution as one transposed 4x4 convolution: 16 of 36 products."""
    if not is_plain(conv, nn.Conv2d):
        called = convolution(conv, precision)
        return lambda x: called(F.interpolate(x, scale_factor=2, mode="nearest"))
    weight = spread_taps(spread_taps(conv.weight.detach().float(), 2), 3).transpose(
        0, 1
    )  # (C_in, C_out, 4, 4)
    weight = weight.to(precision.dtype).clone(memory_format=torch.contiguous_format)
    bias = None if conv.bias is None else conv.bias.detach().to(precision.dtype)
    return lambda x: F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
