"""The models that the authors of VAR published: names, files, sizes, and the settings of their evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from var_ext.checkpoints.sizes import var_config
from var_ext.schedule import SCALES_256, SCALES_512

REPOSITORY = "FoundationVision/var"
TOKENIZER_FILE = "vae_ch160v4096z32.pth"
MODELS = {f"var-d{depth}": depth for depth in (16, 20, 24, 30, 36)}

EVALUATION: Mapping[str, Any] = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}


def transformer_file(name: str) -> str:
    """The file of a model's transformer; all share the tokenizer's."""
    return f"var_d{MODELS[name]}.pth"


def published_config(depth: int) -> dict[str, dict[str, Any]]:
    """Constructor arguments of a published model, without downloading it.

    Args:
        depth: 16, 20, 24 or 30 (256 px) or 36 (512 px, one AdaLN projection shared by all blocks).

    Returns:
        {"vae": arguments of VQVAE, "var": arguments of VAR}.

    Raises:
        ValueError: no model of this depth was published.
    """
    if depth not in MODELS.values():
        raise ValueError(f"depth must be one of {', '.join(map(str, MODELS.values()))}, got {depth}")
    patch_nums = SCALES_512 if depth == 36 else SCALES_256
    vae: dict[str, Any] = {
        "vocab_size": 4096,
        "z_channels": 32,
        "ch": 160,
        "ch_mult": (1, 1, 2, 2, 4),
        "quant_conv_ks": 3,
        "share_quant_resi": 4,
        "v_patch_nums": patch_nums,
        "test_mode": True,
    }
    return {
        "vae": vae,
        "var": var_config(1000, depth, 64 * depth, depth, 4.0, depth == 36, True, patch_nums),
    }
