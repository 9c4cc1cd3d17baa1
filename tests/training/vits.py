"""Small ViTs with random weights, in the layouts of DINO and DINOv2."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def vit_entries(
    *, patch: int = 8, side: int = 4, scaled: bool = False, registers: int = 0
) -> dict[str, Tensor]:
    """Entries of four blocks of 64 channels: DINO's, or with layer scale and register tokens DINOv2's."""
    torch.manual_seed(3)
    c = 64
    found = {
        "cls_token": torch.randn(1, 1, c),
        "pos_embed": torch.randn(1, 1 + side * side, c),
        "patch_embed.proj.weight": torch.randn(c, 3, patch, patch) / (patch * 3**0.5),
        "patch_embed.proj.bias": torch.randn(c),
        "norm.weight": torch.rand(c) + 0.5,
        "norm.bias": torch.randn(c),
    }
    if scaled:
        found["mask_token"] = torch.zeros(1, c)
    if registers:
        found["register_tokens"] = torch.randn(1, registers, c)
    for n in range(4):
        block = {
            "norm1.weight": torch.rand(c) + 0.5, "norm1.bias": torch.randn(c),
            "attn.qkv.weight": torch.randn(3 * c, c) / 8, "attn.qkv.bias": torch.randn(3 * c),
            "attn.proj.weight": torch.randn(c, c) / 8, "attn.proj.bias": torch.randn(c),
            "norm2.weight": torch.rand(c) + 0.5, "norm2.bias": torch.randn(c),
            "mlp.fc1.weight": torch.randn(2 * c, c) / 8, "mlp.fc1.bias": torch.randn(2 * c),
            "mlp.fc2.weight": torch.randn(c, 2 * c) / 8, "mlp.fc2.bias": torch.randn(c),
        }  # fmt: skip
        if scaled:
            block |= {"ls1.gamma": torch.rand(c), "ls2.gamma": torch.rand(c)}
        found |= {f"blocks.{n}.{name}": tensor for name, tensor in block.items()}
    return found


def vit_file(folder: Path) -> Path:
    path = folder / "vit.pth"
    torch.save(vit_entries(), path)
    return path
