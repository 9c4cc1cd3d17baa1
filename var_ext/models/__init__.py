"""The architecture: `quantizer`, `vqvae`, `var`; and the published way to build a pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from var_ext.models.quantizer import MultiScaleQuantizer
from var_ext.models.var import VAR
from var_ext.models.vqvae import VQVAE
from var_ext.schedule import SCALES_256

if TYPE_CHECKING:
    from var_ext.models.hub_classes import VARHF, VQVAEHF

VectorQuantizer2 = MultiScaleQuantizer  # its published name

__all__ = ["VAR", "VARHF", "VQVAE", "VQVAEHF", "MultiScaleQuantizer", "VectorQuantizer2", "build_vae_var"]


def __getattr__(name: str) -> Any:
    """`VARHF` and `VQVAEHF` at first use: importing the hub's client would more than double the memory of an import."""
    if name not in ("VARHF", "VQVAEHF"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from var_ext.models import hub_classes

    return getattr(hub_classes, name)


def build_vae_var(
    device: torch.device | str,
    patch_nums: Sequence[int] = SCALES_256,
    V: int = 4096,
    Cvae: int = 32,
    ch: int = 160,
    share_quant_resi: int = 4,
    num_classes: int = 1000,
    depth: int = 16,
    shared_aln: bool = False,
    attn_l2_norm: bool = True,
    flash_if_available: bool = True,
    fused_if_available: bool = True,
    init_adaln: float = 0.5,
    init_adaln_gamma: float = 1e-5,
    init_head: float = 0.02,
    init_std: float = -1,
) -> tuple[VQVAE, VAR]:
    """A frozen tokenizer and a transformer of published shape: width 64 depth, heads = depth, drop path depth / 240.

    Args:
        device: where to put both.
        patch_nums, V, Cvae, ch, share_quant_resi: see `VQVAE`.
        num_classes, depth, shared_aln, attn_l2_norm: see `VAR`.
        flash_if_available, fused_if_available: accepted for compatibility; `var_ext.backend` decides.
        init_adaln, init_adaln_gamma, init_head, init_std: see `VAR.init_weights`.
    """
    vae = VQVAE(
        vocab_size=V, z_channels=Cvae, ch=ch, share_quant_resi=share_quant_resi, v_patch_nums=patch_nums
    ).to(device)
    var = VAR(
        vae_local=vae,
        num_classes=num_classes,
        depth=depth,
        embed_dim=64 * depth,
        num_heads=depth,
        drop_path_rate=0.1 * depth / 24,
        shared_aln=shared_aln,
        attn_l2_norm=attn_l2_norm,
        patch_nums=patch_nums,
    ).to(device)
    var.init_weights(init_adaln, init_adaln_gamma, init_head, init_std)
    return vae, var
