"""A small tokenizer and transformer, built once a test."""

from __future__ import annotations

import pytest
import torch

from var_ext.models import VAR, VQVAE

PATCH_NUMS = (1, 2, 3, 4)


def small_pair(**options) -> tuple[VQVAE, VAR]:
    """Random weights with gates wide open, so that every part of the network matters."""
    torch.manual_seed(0)
    vae = VQVAE(vocab_size=24, z_channels=8, ch=32, ch_mult=(1, 2), v_patch_nums=PATCH_NUMS)
    var = VAR(
        vae,
        **{
            "num_classes": 5,
            "depth": 2,
            "embed_dim": 64,
            "num_heads": 2,
            "attn_l2_norm": True,
            "patch_nums": PATCH_NUMS,
            **options,
        },
    )
    var.init_weights(init_adaln_gamma=1.0, init_head=1.0, init_std=0.2)
    return vae, var


@pytest.fixture
def pair() -> tuple[VQVAE, VAR]:
    return small_pair()
