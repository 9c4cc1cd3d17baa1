"""The decoder of a sampling: channels last, weights cast or packed and taps of upsampling added up once."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from var_ext import ops
from var_ext.engine.layers import Layer, convolution, upsampling
from var_ext.engine.precision import Precision


class Decoder:
    """f_hat (B, C, P, P) float32 -> images (B, 3, S, S) float32 in [0, 1]; a tokenizer with the published names."""

    def __init__(self, vae: Any, precision: Precision, pack: bool, free: bool) -> None:
        decoder, self.dtype, side = vae.decoder, precision.dtype, vae.schedule.side
        conv, upsample = (
            partial(make, precision=precision, pack=pack, free=free) for make in (convolution, upsampling)
        )
        resnet, attention = (partial(make, conv=conv, dtype=self.dtype) for make in (_resnet, _attention))
        self.steps: list[Layer] = [
            conv(vae.post_quant_conv, side=side),
            conv(decoder.conv_in, side=side),
            resnet(decoder.mid.block_1, side=side),
            attention(decoder.mid.attn_1, side=side),
            resnet(decoder.mid.block_2, side=side),
        ]
        for level in reversed(decoder.up):
            for n, block in enumerate(level.block):
                self.steps.append(resnet(block, side=side))
                if len(level.attn):
                    self.steps.append(attention(level.attn[n], side=side))
            if hasattr(level, "upsample"):
                self.steps.append(upsample(level.upsample.conv, side=side))
                side *= 2
        self.steps += [_norm_silu(decoder.norm_out, self.dtype), conv(decoder.conv_out, side=side)]

    def __call__(self, f_hat: Tensor) -> Tensor:
        h = f_hat.to(self.dtype, memory_format=torch.channels_last)
        for step in self.steps:
            h = step(h)
        # to float32 first: 8 bits hold images in [-1, 1] twice as finely as bfloat16 does
        return h.float().clamp_(-1, 1).add_(1).mul_(0.5).contiguous()


def _norm_silu(norm: nn.GroupNorm, dtype: torch.dtype) -> Layer:
    weight, bias = (p.detach().to(dtype) for p in (norm.weight, norm.bias))
    groups, eps = norm.num_groups, norm.eps
    return lambda x: ops.group_norm_silu(x, weight, bias, groups=groups, eps=eps)


def _resnet(block: Any, *, conv: Any, dtype: torch.dtype, side: int) -> Layer:
    norm1, norm2 = _norm_silu(block.norm1, dtype), _norm_silu(block.norm2, dtype)
    conv1, conv2 = conv(block.conv1, side=side), conv(block.conv2, side=side)
    plain = isinstance(block.nin_shortcut, nn.Identity)
    shortcut = None if plain else conv(block.nin_shortcut, side=side)

    def run(x: Tensor) -> Tensor:
        h = conv2(norm2(conv1(norm1(x))))
        return h.add_(x if shortcut is None else shortcut(x))

    return run


def _attention(block: Any, *, conv: Any, dtype: torch.dtype, side: int) -> Layer:
    norm = block.norm
    weight, bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)
    qkv, proj = conv(block.qkv, side=side), conv(block.proj_out, side=side)

    def run(x: Tensor) -> Tensor:
        h = qkv(F.group_norm(x, norm.num_groups, weight, bias, norm.eps))
        q, k, v = h.flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)  # (B, 1, H*W, C) each
        out = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, H*W, C)
        return proj(out.transpose(1, 2).unflatten(2, x.shape[2:])).add_(x)

    return run
