"""The image tokenizer: encoder, multi-scale residual quantizer, decoder (paper, section 3.2; VQGAN, arXiv 2012.09841).

Names of parameters and methods are those of the published checkpoints and code. Images are (B, 3, S, S) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from var_ext.models.modules import (
    Dropout,
    Part,
    dtype_of,
    is_plain,
    norm_silu,
    plus,
    upsampling_taps,
    without_bias,
)
from var_ext.models.quantizer import MultiScaleQuantizer
from var_ext.schedule import SCALES_256

NORM_GROUPS, NORM_EPS = 32, 1e-6


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


class ResnetBlock(Part):
    """Two rounds of norm, SiLU, 3x3 convolution, with a shortcut: (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = norm_silu(self.norm1, x)  # one name: used-up tensors are freed and leave the caches
        h, bias = without_bias(self.conv1, h)
        h = self.dropout(norm_silu(self.norm2, h, bias))
        return plus(self.conv2, h, self.nin_shortcut(x))


class AttnBlock(Part):
    """Single-head self-attention over all positions, residual: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, H*W, 3C)
        q, k, v = qkv[:, None].chunk(3, dim=-1)  # (B, 1, H*W, C) each
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, H*W, C)
        return plus(self.proj_out, h.transpose(1, 2).unflatten(2, x.shape[2:]), x)


class Downsample(Part):
    """3x3 convolution of stride 2, padded right and bottom only: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(Part):
    """Nearest-neighbour x2, then a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W).

    Computed as one transposed convolution, 4x4 of stride 2: taps that read the same pixel are added first, which
    leaves 16 of 36 multiplications.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if not is_plain(self.conv, nn.Conv2d):
            return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return F.conv_transpose2d(x, upsampling_taps(self.conv.weight), self.conv.bias, stride=2, padding=1)


class Level(Part):
    """Modules of one resolution: residual blocks, each followed by attention at the lowest one; then resampling."""

    def __init__(
        self, channels: Sequence[int], dropout: float, attention: bool, resample: nn.Module | None
    ) -> None:
        super().__init__()
        pairs = list(pairwise(channels))
        self.block = nn.ModuleList(ResnetBlock(a, b, dropout) for a, b in pairs)
        self.attn = nn.ModuleList(AttnBlock(b) for _, b in pairs if attention)
        self.resample = "downsample" if isinstance(resample, Downsample) else "upsample" if resample else None
        if self.resample:
            self.add_module(self.resample, resample)

    def __iter__(self) -> Iterator[nn.Module]:
        for n, block in enumerate(self.block):
            yield block
            if self.attn:
                yield self.attn[n]
        if self.resample:
            yield getattr(self, self.resample)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def _layers(levels: Iterable[Any]) -> Iterator[Any]:
    """What to call in turn: the layers of each level, since a call of the level would keep its input, at the finest one
    the largest feature map, alive to its end; the level itself where hooks or its own forward want to see it."""
    for level in levels:
        yield from level if is_plain(level, Level) else (level,)


class Coder(Part):
    """What encoder and decoder share: how their layers are called.

    Attributes:
        activation_checkpointing: in training, keep the inputs of layers alone, and run each again for its gradient.
    """

    activation_checkpointing = False

    def call(self, layer: Any, x: Tensor) -> Tensor:
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, x, use_reentrant=False)
        return layer(x)


class Middle(Part):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(Coder):
    """Images (B, 3, S, S) -> features (B, C, P, P), P = S / 2^(levels - 1)."""

    def __init__(
        self, ch: int, ch_mult: Sequence[int], z_channels: int, dropout: float, blocks: int = 2
    ) -> None:
        super().__init__()
        widths, last = [ch * m for m in ch_mult], len(ch_mult) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for n, width in enumerate(widths):
            channels = [widths[n - 1] if n else ch, *[width] * blocks]
            self.down.append(Level(channels, dropout, n == last, None if n == last else Downsample(width)))
        self.mid = Middle(widths[-1], dropout)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for layer in _layers(self.down):
            h = self.call(layer, h)
        return self.conv_out(norm_silu(self.norm_out, self.call(self.mid, h))).contiguous()


class Decoder(Coder):
    """Features (B, C, P, P) -> images (B, 3, S, S)."""

    def __init__(
        self, ch: int, ch_mult: Sequence[int], z_channels: int, dropout: float, blocks: int = 3
    ) -> None:
        super().__init__()
        widths, last = [ch * m for m in ch_mult], len(ch_mult) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], dropout)
        self.up = nn.ModuleList()  # finest first, as in the checkpoints; run in reverse
        for n, width in enumerate(widths):
            channels = [widths[min(n + 1, last)], *[width] * blocks]
            self.up.append(Level(channels, dropout, n == last, Upsample(width) if n else None))
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.call(self.mid, self.conv_in(z.contiguous(memory_format=torch.channels_last)))
        for layer in _layers(reversed(self.up)):
            h = self.call(layer, h)
        return self.conv_out(norm_silu(self.norm_out, h)).contiguous()


class VQVAE(Part):
    """Multi-scale residual VQVAE. Arguments are the published ones, and `ch_mult`.

    Args:
        vocab_size, z_channels: number of codes and their channels.
        ch: base width; every `ch * ch_mult[i]` must be a multiple of 32.
        dropout: in the residual blocks.
        beta: weight of the commitment loss.
        using_znorm: search codes by cosine similarity.
        quant_conv_ks: kernel size of the convolutions before and after the quantizer.
        quant_resi, share_quant_resi, default_qresi_counts: see `MultiScaleQuantizer`.
        v_patch_nums: sides of the token maps.
        test_mode: freeze parameters and switch to evaluation.
        ch_mult: width of each level; each level after the first halves the grid.
    """

    def __init__(
        self,
        vocab_size: int = 4096,
        z_channels: int = 32,
        ch: int = 128,
        dropout: float = 0.0,
        beta: float = 0.25,
        using_znorm: bool = False,
        quant_conv_ks: int = 3,
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
        default_qresi_counts: int = 0,
        v_patch_nums: Sequence[int] = SCALES_256,
        test_mode: bool = True,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
    ) -> None:
        super().__init__()
        if min(vocab_size, z_channels, quant_conv_ks) < 1 or quant_conv_ks % 2 == 0:
            sizes = f"{vocab_size}, {z_channels}, {quant_conv_ks}"
            raise ValueError(
                f"vocab_size, z_channels and an odd quant_conv_ks must be at least 1, got {sizes}"
            )
        if any(ch * m % NORM_GROUPS for m in ch_mult):
            widths = [ch * m for m in ch_mult]
            raise ValueError(f"every width ch * ch_mult[i] must be a multiple of {NORM_GROUPS}, got {widths}")
        self.config: dict[str, Any] = {
            "vocab_size": vocab_size,
            "z_channels": z_channels,
            "ch": ch,
            "dropout": dropout,
            "beta": beta,
            "using_znorm": using_znorm,
            "quant_conv_ks": quant_conv_ks,
            "quant_resi": quant_resi,
            "share_quant_resi": share_quant_resi,
            "default_qresi_counts": default_qresi_counts,
            "v_patch_nums": list(v_patch_nums),
            "ch_mult": list(ch_mult),
        }
        self.vocab_size = self.V = vocab_size
        self.Cvae = z_channels
        self.downsample = 2 ** (len(ch_mult) - 1)
        self.encoder = Encoder(ch, ch_mult, z_channels, dropout)
        self.decoder = Decoder(ch, ch_mult, z_channels, dropout)
        self.quantize = MultiScaleQuantizer(
            vocab_size=vocab_size,
            Cvae=z_channels,
            using_znorm=using_znorm,
            beta=beta,
            default_qresi_counts=default_qresi_counts,
            v_patch_nums=v_patch_nums,
            quant_resi=quant_resi,
            share_quant_resi=share_quant_resi,
        )
        self.quant_conv = nn.Conv2d(z_channels, z_channels, quant_conv_ks, padding=quant_conv_ks // 2)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, quant_conv_ks, padding=quant_conv_ks // 2)
        self.schedule = self.quantize.schedule
        if test_mode:
            self.eval().requires_grad_(False)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.schedule.side * self.downsample

    def features(self, img: Tensor) -> Tensor:
        """Continuous features before quantization: (B, 3, S, S) -> (B, C, P, P)."""
        if (
            img.ndim != 4
            or img.shape[1] != 3
            or img.shape[2] % self.downsample
            or img.shape[3] % self.downsample
        ):
            wanted = f"(B, 3, S, S) with S a multiple of {self.downsample}"
            raise ValueError(f"images must have shape {wanted}, got {tuple(img.shape)}")
        return self.quant_conv(self.encoder(img))

    def forward(self, inp: Tensor, ret_usages: bool = False) -> tuple[Tensor, list[float] | None, Tensor]:
        """Training pass: images (B, 3, S, S) -> reconstruction, usage of codes in percent or None, quantizer loss."""
        f_hat, usages, vq_loss = self.quantize(self.features(inp), ret_usages=ret_usages)
        return self.decode(f_hat), usages, vq_loss

    def reconstruct(self, img: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) given back in one pass: (B, 3, S, S), not clamped, and their tokens (B, L) int64."""
        tokens, f_hat, _ = self.quantize.quantize(self.features(img), self.schedule, per_scale=False)
        return self.decode(f_hat), tokens

    def decode(self, f_hat: Tensor) -> Tensor:
        """Quantized features (B, C, P, P) of any dtype -> images (B, 3, S, S) in that of the weights, not clamped."""
        return self.decoder(self.post_quant_conv(f_hat.to(dtype_of(self.post_quant_conv))))

    def fhat_to_img(self, f_hat: Tensor) -> Tensor:
        """Decode quantized features (B, C, P, P) into images (B, 3, S, S), clamped to [-1, 1]."""
        return self.decode(f_hat).clamp(-1, 1)

    def img_to_idxBl(
        self, inp_img_no_grad: Tensor, v_patch_nums: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Tokens of images (B, 3, S, S): (B, p*p) int64 for each scale."""
        features = self.features(inp_img_no_grad)
        return self.quantize.f_to_idxBl_or_fhat(features, to_fhat=False, v_patch_nums=v_patch_nums)

    def idxBl_to_img(
        self, ms_idx_Bl: Sequence[Tensor], same_shape: bool, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """Images from tokens, (B, p*p) for each scale; arguments as in `embed_to_img`."""
        codes = [self.quantize.codes(k, idx) for k, idx in enumerate(ms_idx_Bl)]
        return self.embed_to_img(codes, all_to_max_scale=same_shape, last_one=last_one)

    def embed_to_img(
        self, ms_h_BChw: Sequence[Tensor], all_to_max_scale: bool, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """Images from codes, (B, C, p, p) for each scale: one after each scale, or with `last_one` the last."""
        f_hats = self.quantize.embed_to_fhat(ms_h_BChw, all_to_max_scale=all_to_max_scale, last_one=last_one)
        if isinstance(f_hats, Tensor):
            return self.fhat_to_img(f_hats)
        return [self.fhat_to_img(f_hat) for f_hat in f_hats]

    def img_to_reconstructed_img(
        self, x: Tensor, v_patch_nums: Sequence[int] | None = None, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """Tokenize and decode images (B, 3, S, S): one reconstruction after each scale, or with `last_one` the last."""
        f_hats = self.quantize.f_to_idxBl_or_fhat(self.features(x), to_fhat=True, v_patch_nums=v_patch_nums)
        if last_one:
            return self.fhat_to_img(f_hats[-1])
        return [self.fhat_to_img(f_hat) for f_hat in f_hats]

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `nn.Module`; usage counts for another number of scales are ignored: one tokenizer may serve several."""
        hits = "quantize.ema_vocab_hit_SV"
        own = self.quantize.ema_vocab_hit_SV
        if hits in state_dict and state_dict[hits].shape[0] != own.shape[0]:
            kept = torch.zeros_like(own, device="cpu") if own.is_meta else own
            state_dict = {**state_dict, hits: kept}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
