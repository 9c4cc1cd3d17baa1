"""Multi-scale residual vector quantizer: features to one token map per scale (paper, section 3.2, Algorithms 1, 2).

Names of parameters and methods are those of the published checkpoints and code. Shape letters: B batch, C channels of a
code, P side of the feature grid, p side of a token map, K scales, L tokens, V codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from var_ext import ops
from var_ext.models.keyed import Draws
from var_ext.models.modules import Part
from var_ext.models.remedies import Remedies
from var_ext.schedule import SCALES_256, ScaleSchedule

USED_SHARE = 0.08  # a code counts as used above this share of the hits under uniform use


class PhiBank(Part):
    """The 3x3 convolutions phi that follow upsampling; entry names depend on how scales share them."""

    def __init__(self, channels: int, sharing: int, scales: int) -> None:
        super().__init__()
        count = {0: scales, 1: 1}.get(sharing, sharing)
        convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(count)]
        if sharing == 0:  # one per scale
            for n, conv in enumerate(convs):
                self.add_module(str(n), conv)
        elif sharing == 1:  # one for all
            self.qresi = convs[0]
        else:  # a few, each for the scales nearest its tick
            self.qresi_ls = nn.ModuleList(convs)
        margin = 1 / 3 / count if count == 4 else 1 / 2 / count
        # NumPy's rounding breaks ties: with ten scales and four phi, scales 2 and 7 lie midway between two ticks
        self.ticks = np.linspace(margin, 1 - margin, count).tolist()

    def convolutions(self) -> list[tuple[Tensor, Tensor]]:
        """Weight (C, C, 3, 3) and bias (C,) of each convolution."""
        convs = [m for m in self.modules() if isinstance(m, nn.Conv2d)]
        return [(conv.weight, cast(Tensor, conv.bias)) for conv in convs]

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Weights (N, C, C, 3, 3) and biases (N, C) of all convolutions."""
        weights, biases = zip(*self.convolutions(), strict=True)
        return torch.stack(weights), torch.stack(biases)

    def index_of(self, ratio: float) -> int:
        """The convolution of scale k: the one whose tick is nearest to ratio = k / (K - 1)."""
        return min(range(len(self.ticks)), key=lambda n: abs(self.ticks[n] - ratio))

    def index(self, schedule: ScaleSchedule) -> list[int]:
        """`index_of` for each scale."""
        return [self.index_of(schedule.ratio(k)) for k in range(len(schedule))]


class MultiScaleQuantizer(Part):
    """The quantizer between encoder and decoder; always float32.

    Args:
        vocab_size: V.
        Cvae: C.
        using_znorm: search by cosine similarity instead of squared L2 distance.
        beta: weight of the commitment loss.
        default_qresi_counts: number of phi with `share_quant_resi=0`; 0 means one per scale.
        v_patch_nums: sides of the K token maps.
        quant_resi: weight of the convolution in phi; 0 leaves phi out.
        share_quant_resi: 0 for one phi per scale, 1 for a single phi, n for n phi shared by nearby scales.
    """

    ema_vocab_hit_SV: Tensor
    draws: Draws | None = None  # where a trainer keys the rows
    remedies: Remedies | None = None  # what a trainer adds to the published pass
    prog_si = -1  # set by the published trainer: only tokens of scales 0..prog_si; below 0: all

    def __init__(
        self,
        vocab_size: int,
        Cvae: int,
        using_znorm: bool = False,
        beta: float = 0.25,
        default_qresi_counts: int = 0,
        v_patch_nums: Sequence[int] = SCALES_256,
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
    ) -> None:
        super().__init__()
        self.vocab_size, self.Cvae, self.using_znorm, self.beta = vocab_size, Cvae, using_znorm, beta
        self.schedule = ScaleSchedule(v_patch_nums)
        self.quant_resi_ratio, self.phi_ratio = quant_resi, abs(quant_resi)
        if self.phi_ratio > 1e-6:
            self.quant_resi = PhiBank(Cvae, share_quant_resi, default_qresi_counts or len(self.schedule))
        self.embedding = nn.Embedding(vocab_size, Cvae)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(self.schedule), vocab_size))
        self.record_hit = 0  # updates of ema_vocab_hit_SV so far
        self.collected: Tensor | None = None  # (K, V): where a trainer adds up the hits of micro-batches

    @property
    def v_patch_nums(self) -> tuple[int, ...]:
        """Sides of the token maps."""
        return self.schedule.patch_nums

    def phi(self, schedule: ScaleSchedule) -> tuple[Tensor, Tensor, list[int]]:
        """Weights (N, C, C, 3, 3) and biases (N, C) of phi, and the index of each scale's own."""
        if self.phi_ratio > 1e-6:
            weight, bias = self.quant_resi.stacked()
            return weight.float(), bias.float(), self.quant_resi.index(schedule)
        zeros = torch.zeros(1, self.Cvae, self.Cvae, 3, 3, device=self.embedding.weight.device)
        return zeros, zeros[:, :, 0, 0, 0], [0] * len(schedule)

    def quantize(
        self, features: Tensor, schedule: ScaleSchedule, *, per_scale: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`ops.residual_quantize` with this codebook: tokens (B, L), f_hat (B, C, P, P), scales (K, B, C, P, P)."""
        weight, bias, index = self.phi(schedule)
        with torch.autocast(features.device.type, enabled=False):
            return ops.residual_quantize(
                features.float(),
                self.embedding.weight.float(),
                weight,
                bias,
                index,
                schedule,
                ratio=self.phi_ratio,
                cosine=self.using_znorm,
                per_scale=per_scale,
            )

    def forward(self, f_BChw: Tensor, ret_usages: bool = False) -> tuple[Tensor, list[float] | None, Tensor]:
        """Training pass over features (B, C, P, P).

        Returns:
            f_hat (B, C, P, P) with a straight-through gradient; with `ret_usages` the share of used codes at each
            scale, in percent; the loss, mean over scales of beta * mse(stop(f_hat_k), f) + mse(f_hat_k, stop(f)).
            In training `remedies` change both.
        """
        features = f_BChw.float()
        tokens, f_hat, scales = self.quantize(features, self.schedule, per_scale=True)
        assert scales is not None
        if self.training and self.remedies is not None:
            with torch.autocast(features.device.type, enabled=False):
                f_hat, loss = self.remedies(self, features, tokens, scales)
        else:
            commitment = F.mse_loss(scales.detach(), features.expand_as(scales))
            loss = self.beta * commitment + F.mse_loss(scales, features.detach().expand_as(scales))
        if self.training:
            hits = self.hits(tokens)
            if self.collected is not None:
                self.collected += hits
            else:
                if dist.is_available() and dist.is_initialized():
                    dist.all_reduce(hits)
                self.record_hits(hits)
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        usages = self.usages(ranks * features.numel() // features.shape[1]) if ret_usages else None
        return f_hat, usages, loss

    def uniform(self, rows: int, count: int) -> Tensor:
        """Random numbers of the rows of a training pass: (rows, count) float32 in [0, 1)."""
        if self.draws is not None:
            return self.draws.uniform(count)
        return torch.rand(rows, count, device=self.embedding.weight.device)

    @torch.no_grad()
    def hits(self, tokens: Tensor) -> Tensor:
        """How often each scale uses each code: (B, L) -> (K, V) float32."""
        counts = [tokens[:, s].flatten().bincount(minlength=self.vocab_size) for s in self.schedule.slices]
        return torch.stack(counts).float()

    @torch.no_grad()
    def record_hits(self, hits: Tensor) -> None:
        """Average in the hits (K, V) of a step, of all ranks."""
        decay = 0.0 if self.record_hit == 0 else 0.9 if self.record_hit < 100 else 0.99
        self.ema_vocab_hit_SV.mul_(decay).add_(hits, alpha=1 - decay)
        self.record_hit += 1

    def usages(self, count: int) -> list[float]:
        """Share (%) of the codes in use at each scale, where a step of all ranks has `count` feature vectors."""
        # as published, every scale uses the uniform share of the finest one
        used = self.ema_vocab_hit_SV >= USED_SHARE * count / self.vocab_size
        return (100 * used.float().mean(dim=1)).tolist()

    def f_to_idxBl_or_fhat(
        self, f_BChw: Tensor, to_fhat: bool, v_patch_nums: Sequence[int | tuple[int, int]] | None = None
    ) -> list[Tensor]:
        """Quantize features (B, C, P, P); for each scale its tokens (B, p*p), or f_hat (B, C, P, P) after it.

        Args:
            v_patch_nums: sides of the token maps, if not the model's; the last one is P; square maps only.

        Raises:
            ValueError: a map is not square, or the last one is not P x P.
        """
        schedule = self.schedule if v_patch_nums is None else ScaleSchedule(map(_square_side, v_patch_nums))
        tokens, _, scales = self.quantize(f_BChw.detach(), schedule, per_scale=to_fhat)
        found = list(tokens[:, s] for s in schedule.slices) if scales is None else list(scales)
        return found if self.prog_si < 0 else found[: self.prog_si + 1]

    def embed_to_fhat(
        self, ms_h_BChw: Sequence[Tensor], all_to_max_scale: bool = True, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """Sum the codes of all scales, (B, C, p, p) each, into f_hat.

        Args:
            all_to_max_scale: work at full size throughout, as the model was trained; else each scale at its own size.
            last_one: return f_hat after the last scale, (B, C, P, P), instead of after each one.
        """
        side = self.schedule.side if all_to_max_scale else self.schedule.patch_nums[0]
        first = ms_h_BChw[0]
        f_hat = first.new_zeros(first.shape[0], self.Cvae, side, side, dtype=torch.float32)
        f_hats = []
        for k, codes in enumerate(ms_h_BChw):
            if not all_to_max_scale:
                f_hat = ops.bicubic_upsample(f_hat, self.schedule.patch_nums[k])
            f_hat, _ = self.step(k, f_hat, codes, next_side=None)
            f_hats.append(f_hat)
        return f_hat if last_one else f_hats

    def idxBl_to_var_input(self, gt_ms_idx_Bl: Sequence[Tensor]) -> Tensor | None:
        """Teacher-forcing input of the transformer from the tokens of the first n scales, (B, p*p) each.

        Returns:
            for scales 1..n-1 the sum of the scales before, at the scale's own size: (B, L' - p_0^2, C) float32,
            where L' counts the tokens of all n scales. None for n = 1.
        """
        grids = [self.codes(k, idx) for k, idx in enumerate(gt_ms_idx_Bl)][:-1]
        side, batch = self.schedule.side, gt_ms_idx_Bl[0].shape[0]
        f_hat = self.embedding.weight.new_zeros(batch, self.Cvae, side, side, dtype=torch.float32)
        inputs = []
        for k, codes in enumerate(grids):
            f_hat, pooled = self.step(k, f_hat, codes, next_side=self.schedule.patch_nums[k + 1])
            inputs.append(pooled.flatten(2).transpose(1, 2))  # (B, p*p, C)
        return torch.cat(inputs, dim=1) if inputs else None

    def get_next_autoregressive_input(
        self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add the codes (B, C, p, p) of scale `si` of `SN` to f_hat (B, C, P, P).

        Returns:
            the new f_hat, and the next scale's input (B, C, p', p'); after the last scale the new f_hat twice.
        """
        return self.step(
            si, f_hat, h_BChw, next_side=self.schedule.patch_nums[si + 1] if si < SN - 1 else None
        )

    def codes(self, k: int, idx_Bl: Tensor) -> Tensor:
        """Codes of the token map of scale k: (B, p*p) -> (B, C, p, p).

        Raises:
            ValueError: there is no scale k, or it has another number of tokens.
        """
        if k >= len(self.schedule):
            raise ValueError(f"there must be at most {len(self.schedule)} token maps, got one more")
        if idx_Bl.ndim != 2 or idx_Bl.shape[1] != self.schedule.lengths[k]:
            wanted = f"(B, {self.schedule.lengths[k]})"
            raise ValueError(f"tokens of scale {k} must have shape {wanted}, got {tuple(idx_Bl.shape)}")
        side = self.schedule.patch_nums[k]
        return self.embedding(idx_Bl).transpose(1, 2).unflatten(2, (side, side))

    def step(self, k: int, f_hat: Tensor, codes: Tensor, *, next_side: int | None) -> tuple[Tensor, Tensor]:
        """f_hat (B, C, P, P) with the codes (B, C, p, p) of scale k added, and the next scale's input at its side."""
        # stack only the one needed: stacking all would take as long as the step
        if self.phi_ratio > 1e-6:
            bank = self.quant_resi
            weight, bias = bank.convolutions()[bank.index_of(self.schedule.ratio(k))]
        else:
            weight, bias = (t[0] for t in self.phi(self.schedule)[:2])
        with torch.autocast(f_hat.device.type, enabled=False):
            return ops.residual_step(
                f_hat,
                codes.to(f_hat.dtype),
                weight.float(),
                bias.float(),
                next_size=next_side,
                ratio=self.phi_ratio,
            )


def _square_side(side: int | tuple[int, int]) -> int:
    height, width = (side, side) if isinstance(side, int) else side
    if height != width:
        raise ValueError(f"token maps must be square, got {height} x {width}")
    return height
