"""Heads over a frozen ViT: the discriminator of StyleGAN-T (arXiv 2301.09515), as the authors of VAR train with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from var_ext.models.keyed import Draws
from var_ext.training.critics.augment import crop_at
from var_ext.training.frozen_vit import FrozenViT

KERNEL = 9
CROPPED = 0.5  # share of larger images of which a part is seen in full resolution


def _block(channels: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, padding_mode="circular")
    return nn.Sequential(conv, nn.GroupNorm(32, channels, eps=1e-6), nn.LeakyReLU(0.2))


class Head(nn.Module):
    """(B, C, N) features of N patches -> logits (B, N)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = _block(channels, 1), _block(channels, KERNEL)
        self.last = nn.Conv1d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = (self.second(h) + h) * 0.5**0.5
        return self.last(h)[:, 0]


class ViTDiscriminator(nn.Module):
    """(B, 3, S, S) in [-1, 1] -> logits (B, 5 N) of N patches: a head before the first block of a ViT and after four.

    Only the heads are trained and have entries. GroupNorm instead of the published SyncBatchNorm: rows of a batch do
    not affect each other, so it can be split in any way.

    Args:
        vit: the frozen network; its channels must be a multiple of 32.
    """

    draws: Draws | None = None  # where the trainer keys the rows

    def __init__(self, vit: FrozenViT) -> None:
        super().__init__()
        self.frozen = (vit,)  # in a tuple: no part of this module's parameters and entries
        quarters = [round(vit.depth * (i + 1) / 4) - 1 for i in range(4)]
        self.after = sorted(set(quarters) - {-1})
        self.heads = nn.ModuleList(Head(vit.channels) for _ in range(1 + len(self.after)))

    def forward(self, images: Tensor) -> Tensor:
        (vit,) = self.frozen
        tokens = vit(self.fitted(images), self.after)[:-1]
        # Where the decoder alone learns, heads are frozen for this pass and no longer when its gradient is computed:
        # run again then, they would keep other tensors than the first time, which torch refuses.
        trained = next(self.heads.parameters()).requires_grad
        again = vit.activation_checkpointing and trained and torch.is_grad_enabled()
        logits = []
        for head, x in zip(self.heads, tokens, strict=True):
            x = (x[:, 1:] + x[:, :1]).transpose(1, 2)  # (B, C, N), the class token in each patch
            logits.append(checkpoint(head, x, use_reentrant=False) if again else head(x))
        return torch.cat(logits, 1)

    def fitted(self, images: Tensor) -> Tensor:
        """Images in the ViT's size; of larger ones some, by row, as a random part instead of the whole."""
        (vit,) = self.frozen
        whole = vit.fitted(images)
        if self.draws is None or images.shape[-1] <= vit.size:
            return whole
        # the same for all views of a row in a step, so that consistency compares what can be compared
        drawn = self.draws.uniform(3).repeat(len(images) // len(self.draws.rows.keys), 1)  # (B, 3)
        start = (drawn[:, 1:] * (images.shape[-1] - vit.size + 1)).long()
        part = crop_at(images, start, vit.size)
        return torch.where((drawn[:, 0] < CROPPED)[:, None, None, None], part, whole)
