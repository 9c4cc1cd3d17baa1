"""A tokenizer and a transformer that are small enough to build, save and sample in every test."""

from __future__ import annotations

import torch

from var_ext.models import VAR, VQVAE
from var_ext.sampling import Sampler

SCALES = (1, 2, 4)


def tiny(
    seed: int = 0,
    *,
    share: int = 4,
    patch_nums: tuple[int, ...] = SCALES,
    shared_aln: bool = False,
    attn_l2_norm: bool = True,
    num_classes: int = 5,
) -> tuple[VQVAE, VAR]:
    """Models of a few thousand parameters with every kind of entry, and weights that are not all alike."""
    torch.manual_seed(seed)
    vae = VQVAE(
        vocab_size=16, z_channels=8, ch=32, ch_mult=(1, 2), share_quant_resi=share, v_patch_nums=patch_nums
    )
    var = VAR(
        vae,
        num_classes=num_classes,
        depth=2,
        embed_dim=64,
        num_heads=1,
        shared_aln=shared_aln,
        attn_l2_norm=attn_l2_norm,
        patch_nums=patch_nums,
    )
    return vae, var.eval()


def answer(sampler: Sampler) -> list[list[int]]:
    return sampler.tokens([0, 3, 5], [1, 2, 3], cfg=1.5, top_k=0, top_p=0.0).tolist()
