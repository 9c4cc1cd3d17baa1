"""The sizes of a model from the shapes of its entries: `.pth` files hold no arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from var_ext.checkpoints.atomic import CheckpointError
from var_ext.schedule import SCALES_256, SCALES_512

USAGE = "quantize.ema_vocab_hit_SV"  # (K, V): the only tokenizer entry that depends on the scales


def var_config(
    num_classes: int,
    depth: int,
    embed_dim: int,
    num_heads: int,
    mlp_ratio: float,
    shared_aln: bool,
    attn_l2_norm: bool,
    patch_nums: tuple[int, ...],
) -> dict[str, Any]:
    """Arguments of VAR; the rates, which are not in checkpoints, are those of the published training."""
    return {
        "num_classes": num_classes,
        "depth": depth,
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "mlp_ratio": mlp_ratio,
        "drop_rate": 0.0,
        "attn_drop_rate": 0.0,
        "drop_path_rate": 0.1 * depth / 24,
        "norm_eps": 1e-6,
        "shared_aln": shared_aln,
        "cond_drop_rate": 0.1,
        "attn_l2_norm": attn_l2_norm,
        "patch_nums": patch_nums,
    }


def _shape(entries: Mapping[str, torch.Tensor], name: str, ndim: int, source: str) -> tuple[int, ...]:
    if name not in entries or entries[name].ndim != ndim or not entries[name].numel():
        came = f"shape {tuple(entries[name].shape)}" if name in entries else "no such entry"
        raise CheckpointError(
            f"{source} must have an entry {name} with {ndim} dimensions and no empty one, got {came}"
        )
    return tuple(entries[name].shape)


def deduce_vae(
    entries: Mapping[str, torch.Tensor], patch_nums: Sequence[int] | None, source: str
) -> dict[str, Any]:
    """Constructor arguments of the VQVAE that these entries belong to.

    Args:
        entries: name -> tensor; only shapes are read.
        patch_nums: the scales; None takes the published 256 px ones if the entries were trained on ten
            scales.
        source: what to call the entries in an error.

    Raises:
        CheckpointError: entries that a VQVAE has are missing, or the scales have to be given.
    """
    num_scales = _shape(entries, USAGE, 2, source)[0]
    if patch_nums is None and num_scales != len(SCALES_256):
        raise CheckpointError(
            f"{source} has {num_scales} scales: patch_nums must name their sides, none were given"
        )
    vocab_size, z_channels = _shape(entries, "quantize.embedding.weight", 2, source)
    ch = _shape(entries, "encoder.conv_in.weight", 4, source)[0]
    levels = len({name.split(".")[2] for name in entries if name.startswith("encoder.down.")})
    widths = [_shape(entries, f"encoder.down.{i}.block.0.conv1.weight", 4, source)[0] for i in range(levels)]
    partly_shared = len(
        {n for n in entries if re.fullmatch(r"quantize\.quant_resi\.qresi_ls\.\d+\.weight", n)}
    )
    own = len({name for name in entries if re.fullmatch(r"quantize\.quant_resi\.\d+\.weight", name)})
    return {
        "vocab_size": vocab_size,
        "z_channels": z_channels,
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "quant_conv_ks": _shape(entries, "quant_conv.weight", 4, source)[2],
        "share_quant_resi": partly_shared or (0 if own else 1),
        "default_qresi_counts": own,
        "v_patch_nums": tuple(patch_nums or SCALES_256),
        "test_mode": True,
    }


def deduce_var(
    entries: Mapping[str, torch.Tensor],
    source: str,
    *,
    patch_nums: Sequence[int] | None = None,
    num_heads: int | None = None,
) -> dict[str, Any]:
    """Constructor arguments of the VAR that these entries belong to.

    Args:
        entries: name -> tensor; besides shapes only the scale of each position (`lvl_1L`) is read, unless it
            is on the meta device: then the two published schedules are tried.
        source: what to call the entries in an error.
        patch_nums: the scales, where they can not be deduced.
        num_heads: the number of heads, for models without QK L2 norm whose heads are not 64 channels wide.

    Raises:
        CheckpointError: entries that a VAR has are missing, or a size is needed and not given.
    """
    length, width = _shape(entries, "pos_1LC", 3, source)[1:]
    num_scales = _shape(entries, "lvl_embed.weight", 2, source)[0]
    scale_mul = entries.get("blocks.0.attn.scale_mul_1H11")
    if scale_mul is not None:
        num_heads = _shape(entries, "blocks.0.attn.scale_mul_1H11", 4, source)[1]
    elif num_heads is None:
        if width % 64:
            raise CheckpointError(f"{source} is {width} wide, not a multiple of 64: num_heads must be given")
        num_heads = width // 64
    return var_config(
        num_classes=_shape(entries, "class_emb.weight", 2, source)[0] - 1,
        depth=len({name.split(".")[1] for name in entries if name.startswith("blocks.")}),
        embed_dim=width,
        num_heads=num_heads,
        mlp_ratio=_shape(entries, "blocks.0.ffn.fc1.weight", 2, source)[0] / width,
        shared_aln="shared_ada_lin.1.weight" in entries,
        attn_l2_norm=scale_mul is not None,
        patch_nums=_patch_nums(entries.get("lvl_1L"), num_scales, length, patch_nums, source),
    )


def _patch_nums(
    levels: torch.Tensor | None, num_scales: int, length: int, given: Sequence[int] | None, source: str
) -> tuple[int, ...]:
    """Sides of the scales: from the scale index of every position if it is there, else the published ones."""
    if given is None and levels is not None and not levels.is_meta:
        if levels.dtype != torch.int64 or bool(((levels < 0) | (levels >= num_scales)).any()):
            came = f"{levels.min()}..{levels.max()}" if levels.dtype == torch.int64 else str(levels.dtype)
            raise CheckpointError(f"{source} must have lvl_1L of int64 in 0..{num_scales - 1}, got {came}")
        sides = tuple(round(int(count) ** 0.5) for count in levels.flatten().bincount(minlength=num_scales))
        candidates = [sides]
    else:
        candidates = [SCALES_256, SCALES_512] if given is None else [tuple(given)]
    for sides in candidates:
        if len(sides) == num_scales and sum(side * side for side in sides) == length:
            return sides
    came = f", got {tuple(given)}" if given is not None else ""
    raise CheckpointError(
        f"{source} has {length} positions in {num_scales} scales: patch_nums must have {num_scales} sides "
        f"whose squares sum to {length}{came}"
    )
