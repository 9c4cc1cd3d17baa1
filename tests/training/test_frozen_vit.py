"""The frozen ViT against the formula written out, in the layouts of DINO and DINOv2."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.training.vits import vit_entries
from var_ext.checkpoints import CheckpointError
from var_ext.training.frozen_vit import FrozenViT, load_vit


def by_hand(entries: dict[str, Tensor], images: Tensor) -> list[Tensor]:
    """Tokens before each block and normed at the end, in float64, one head of 64 channels."""
    e = {name: tensor.double() for name, tensor in entries.items()}
    patch = e["patch_embed.proj.weight"].shape[-1]
    x = (images.double() + 1) / 2
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    patches = x.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, n, n, p, p)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ e["patch_embed.proj.weight"].flatten(1).T + e["patch_embed.proj.bias"]
    x = torch.cat([e["cls_token"].expand(len(x), -1, -1), x], 1) + e["pos_embed"]
    found, extra = [x], 0
    if "register_tokens" in e:
        extra = e["register_tokens"].shape[1]
        x = torch.cat([x[:, :1], e["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)

    def norm(h: Tensor, name: str) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], e[f"{name}.weight"], e[f"{name}.bias"], 1e-6)

    def bare(h: Tensor) -> Tensor:
        return torch.cat([h[:, :1], h[:, 1 + extra :]], 1)

    for n in range(4):
        b = f"blocks.{n}"
        q, k, v = (norm(x, f"{b}.norm1") @ e[f"{b}.attn.qkv.weight"].T + e[f"{b}.attn.qkv.bias"]).chunk(3, -1)
        h = (q @ k.transpose(1, 2) / 8).softmax(-1) @ v
        h = h @ e[f"{b}.attn.proj.weight"].T + e[f"{b}.attn.proj.bias"]
        x = x + h * e.get(f"{b}.ls1.gamma", 1)
        h = norm(x, f"{b}.norm2") @ e[f"{b}.mlp.fc1.weight"].T + e[f"{b}.mlp.fc1.bias"]
        h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
        x = x + (h @ e[f"{b}.mlp.fc2.weight"].T + e[f"{b}.mlp.fc2.bias"]) * e.get(f"{b}.ls2.gamma", 1)
        found.append(bare(x))
    return [*found, bare(norm(x, "norm"))]


@pytest.mark.parametrize(("scaled", "registers"), [(False, 0), (True, 0), (True, 2)])
def test_the_formula(scaled: bool, registers: int) -> None:
    entries = vit_entries(scaled=scaled, registers=registers)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    found = FrozenViT(entries, 32)(images, [0, 3])
    wanted = by_hand(entries, images)
    for a, b in zip(found, [wanted[0], wanted[1], wanted[4], wanted[5]], strict=True):
        # four blocks in float32
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-5 * float(b.abs().max()))


def test_positions_are_resized_and_images_fitted() -> None:
    entries = vit_entries()
    vit = FrozenViT(entries, 48)
    assert vit.pos_embed.shape == (1, 37, 64) and torch.equal(vit.pos_embed[:, 0], entries["pos_embed"][:, 0])
    flat = {**entries, "pos_embed": entries["pos_embed"][:, :1].expand(1, 17, 64)}
    torch.testing.assert_close(FrozenViT(flat, 48).pos_embed, entries["pos_embed"][:, :1].expand(1, 37, 64))
    images = torch.rand(1, 3, 96, 96)
    assert (
        torch.allclose(vit.fitted(images), F.avg_pool2d(images, 2))
        and vit.fitted(images[..., :48, :48]).shape[-1] == 48
    )
    assert vit.fitted(images[..., :16, :16]).shape == (1, 3, 48, 48)


def cubic(before: int, side: int) -> Tensor:
    """(side, before): Keys' cubic with a = -0.75 at steps of before / (side + 0.1), rows of edges repeated."""
    weights = torch.zeros(side, before, dtype=torch.float64)
    for i in range(side):
        at = (i + 0.5) * before / (side + 0.1) - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            d = abs(at - j)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[i, min(max(j, 0), before - 1)] += near if d <= 1 else far if d < 2 else 0.0
    return weights


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("side", [2, 3, 7])
def test_positions_without_registers_are_resized_as_published(side: int, scaled: bool) -> None:
    entries = vit_entries(scaled=scaled)
    table = entries["pos_embed"][0, 1:].double().unflatten(0, (4, 4))
    wanted = torch.einsum("ia,jb,abc->ijc", cubic(4, side), cubic(4, side), table).flatten(0, 1)
    found = FrozenViT(entries, 8 * side).pos_embed[0, 1:]
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)  # float32


def test_it_is_frozen_and_checkpointing_changes_no_bit() -> None:
    vit = FrozenViT(vit_entries(), 32)
    assert not any(p.requires_grad for p in vit.parameters()) and not vit.train().training
    gradients = []
    for again in (False, True):
        vit.activation_checkpointing = again
        images = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32).requires_grad_(True)
        vit(images)[-1].square().sum().backward()
        gradients.append(images.grad)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0  # type: ignore[union-attr, arg-type]


def test_files_of_the_publications(tmp_path: Path) -> None:
    entries = vit_entries(scaled=True)
    torch.save(entries, tmp_path / "plain.pth")
    torch.save({f"module.backbone.{n}": t for n, t in entries.items()}, tmp_path / "wrapped.pth")
    torch.save(
        {"teacher": {f"module.backbone.{n}": t for n, t in entries.items()}, "student": {}, "epoch": 3},
        tmp_path / "training.pth",
    )
    digests = {load_vit(str(path), 32).digest() for path in tmp_path.iterdir()}
    assert digests == {FrozenViT(entries, 32).digest()}


def test_what_is_no_vit_is_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(
        CheckpointError, match=r"must hold a ViT as published by DINO .*, got fc\.weight \.\.\."
    ):
        load_vit(str(tmp_path / "other.pth"), 32)
    broken = vit_entries()
    del broken["blocks.2.attn.proj.bias"]
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match=r"blocks\.2\.attn\.proj\.bias"):
        load_vit(str(tmp_path / "broken.pth"), 32)
    torch.save(vit_entries(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="multiple of its patches of 8 pixels, got 30"):
        load_vit(str(tmp_path / "vit.pth"), 30)
