"""The transformer of a sampling: one scale at a time, keys and values of all scales in one block of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from var_ext import ops
from var_ext.engine.layers import Layer, is_plain, linear
from var_ext.engine.precision import Precision

LARGEST_KEPT = 2**27  # bytes of keys and values that stay between samplings; more would be missed in decoding


class Modulation(NamedTuple):
    """Vectors (B, C) that the class gives a block."""

    gamma1: Tensor
    gamma2: Tensor
    scale1: Tensor
    scale2: Tensor
    shift1: Tensor
    shift2: Tensor


class Block:
    """One block, from a module with the published names."""

    def __init__(self, block: Any, layer: Callable[..., Layer], dtype: torch.dtype) -> None:
        attn, ffn = block.attn, block.ffn
        heads = attn.num_heads
        self.heads, self.softmax_scale, self.eps = heads, attn.scale, block.norm_eps
        self.qkv = layer(attn.mat_qkv)
        self.q_bias, self.v_bias = (b.detach().to(dtype).view(heads, -1) for b in (attn.q_bias, attn.v_bias))
        self.log_scale = attn.scale_mul_1H11.detach().to(dtype).flatten() if attn.attn_l2_norm else None
        self.proj = layer(attn.proj)
        fused = is_plain(ffn.fc1, torch.nn.Linear) and ffn.fc1.bias is not None
        self.fc1 = layer(ffn.fc1, bias=not fused)
        self.fc1_bias = ffn.fc1.bias.detach().to(dtype) if fused else None
        self.fc2 = layer(ffn.fc2)
        if block.shared_aln:
            self.offset = block.ada_gss.detach()[0].to(dtype)  # (1, 6, C)
            self.project: Layer | None = None
        else:
            # the gates and norms keep 16 bits: their weights are read once an image
            self.project = layer(block.ada_lin[-1], int8=False)

    def modulation(self, activated: Tensor, shared: Tensor | None) -> Modulation:
        """Of SiLU(class embedding) (B, C), or of its shared projection (B, 6C)."""
        if self.project is not None:
            return Modulation(*self.project(activated).unflatten(-1, (6, -1)).unbind(1))
        assert shared is not None
        return Modulation(*(shared.unflatten(-1, (6, -1)) + self.offset).unbind(1))

    def attention(self, h: Tensor, k_cache: Tensor, v_cache: Tensor, offset: int) -> Tensor:
        """h (B, l, C) against the cache (B, L, H, D), of which `offset` entries are filled: l more are now."""
        qkv = self.qkv(h).unflatten(-1, (3, self.heads, -1))  # (B, l, 3, H, D)
        q = ops.qk_norm(
            qkv, self.q_bias, self.v_bias, self.log_scale, cache=(k_cache, v_cache), offset=offset
        )
        out = ops.cached_attention(q, k_cache, v_cache, offset + h.shape[1], scale=self.softmax_scale)
        return self.proj(out.flatten(2))

    def feed_forward(self, h: Tensor) -> Tensor:
        """(B, l, C) -> (B, l, C)."""
        u = self.fc1(h)
        gelu = torch.nn.functional.gelu
        return self.fc2(
            gelu(u, approximate="tanh") if self.fc1_bias is None else ops.bias_gelu(u, self.fc1_bias)
        )


class Transformer:
    """All blocks, embeddings and the head, from a module with the published names."""

    def __init__(self, var: Any, precision: Precision, pack: bool, free: bool) -> None:
        dtype = precision.dtype
        layer = partial(linear, precision=precision, pack=pack, free=free)
        self.dtype, self.classes = dtype, var.class_emb
        self.blocks = [Block(block, layer, dtype) for block in var.blocks]
        self.heads, self.channels = var.num_heads, var.C
        shared = var.blocks[0].shared_aln
        self.shared = layer(var.shared_ada_lin[-1], int8=False) if shared else None
        self.head_modulation = layer(var.head_nm.ada_lin[-1], int8=False)
        self.head_eps = var.head_nm.norm_eps
        self.head = layer(var.head, int8=False)
        # embeddings stay in the model's dtype: 32 channels in, once a scale
        self.words = linear(var.word_embed, Precision("", var.word_embed.weight.dtype), pack=False)
        self.words_dtype = var.word_embed.weight.dtype
        levels = var.lvl_1L.to(var.pos_1LC.device)  # a shared model moves without this buffer
        self.positions = (var.lvl_embed(levels) + var.pos_1LC).detach()  # (1, L, C)
        self.start = var.pos_start.detach()  # (1, p_0^2, C)
        self._kept: Tensor | None = None

    @contextmanager
    def cache(self, rows: int, length: int) -> Iterator[Tensor]:
        """Memory for keys and values: (blocks, 2, rows, length, H, D).

        On the CPU that of the last sampling, if no other has it now: fresh memory costs a fault a page.
        """
        shape = (len(self.blocks), 2, rows, length, self.heads, self.channels // self.heads)
        kept, self._kept = self._kept, None
        if kept is None or kept.shape != shape:
            kept = None  # the old goes before the new comes
            with torch.inference_mode(False):
                kept = torch.empty(shape, dtype=self.dtype, device=self.start.device)
        yield kept
        if kept.device.type == "cpu" and kept.nbytes <= LARGEST_KEPT:
            self._kept = kept

    def condition(self, labels: Tensor) -> Tensor:
        """Class embeddings: (B,) -> (B, C)."""
        return self.classes(labels)

    def modulations(self, cond: Tensor) -> tuple[list[Modulation], Tensor, Tensor]:
        """For each block, and scale and shift (B, C) of the norm before the head. They depend on the class alone: once
        an image, not once a scale."""
        activated = torch.nn.functional.silu(cond).to(self.dtype)
        shared = None if self.shared is None else self.shared(activated)
        scale, shift = self.head_modulation(activated).unflatten(-1, (2, -1)).unbind(1)
        return [block.modulation(activated, shared) for block in self.blocks], scale, shift

    def first(self, cond: Tensor) -> Tensor:
        """Input of the first scale: (B, C) -> (B, p_0^2, C)."""
        return (cond[:, None] + self.start + self.positions[:, : self.start.shape[1]]).to(self.dtype)

    def embed(self, pooled: Tensor, tokens: slice, rows: int) -> Tensor:
        """Input of a later scale from f_hat at its size: (B, Cvae, p, p) -> (rows, p * p, C), halves alike."""
        words = self.words(pooled.flatten(2).transpose(1, 2).to(self.words_dtype))
        x = words + self.positions[:, tokens]
        return x.to(self.dtype).repeat(rows // len(x), 1, 1) if len(x) else x.to(self.dtype)

    def __call__(
        self,
        x: Tensor,
        modulations: list[Modulation],
        head: tuple[Tensor, Tensor],
        cache: Tensor,
        offset: int,
    ) -> Tensor:
        """One scale (B, l, C) through all blocks and the norm before the head."""
        branch: Tensor | None = None
        gate: Tensor | None = None
        for block, m, (k_cache, v_cache) in zip(self.blocks, modulations, cache, strict=True):
            x, h = _normed(x, branch, gate, m.scale1, m.shift1, block.eps)
            branch, gate = block.attention(h, k_cache, v_cache, offset), m.gamma1
            x, h = _normed(x, branch, gate, m.scale2, m.shift2, block.eps)
            branch, gate = block.feed_forward(h), m.gamma2
        return _normed(x, branch, gate, *head, self.head_eps)[1]


def _normed(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x with the last branch added, and its modulated norm: one pass over memory."""
    if branch is None or gate is None:
        return x, ops.adaln(x, scale, shift, eps=eps)
    return ops.adaln(x, scale, shift, branch=branch, gate=gate, eps=eps)
