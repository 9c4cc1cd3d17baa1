"""A frozen vision transformer of DINO (arXiv 2104.14294) or DINOv2 (arXiv 2304.07193); weights are a user's file.

Entries have the names of both publications, which are timm's too: `blocks.N.attn.qkv.weight` and so on. Width, depth,
patch size, layer scale and register tokens follow from the shapes; heads have 64 channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from var_ext.checkpoints import CheckpointError, read_entries
from var_ext.checkpoints.digests import digest_of_entries

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of input in [0, 1]
HEAD = 64  # channels
WRAPPINGS = ("teacher",)  # under which the publications' training checkpoints have the averaged network


class Block(nn.Module):
    """Attention and MLP, each after a norm and added: (B, N, C) -> (B, N, C)."""

    def __init__(self, channels: int, hidden: int, scaled: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(channels, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(channels, 3 * channels), "proj": nn.Linear(channels, channels)}
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(channels, hidden), "fc2": nn.Linear(hidden, channels)})
        if scaled:
            self.ls1, self.ls2 = (
                nn.ParameterDict({"gamma": nn.Parameter(torch.ones(channels))}) for _ in range(2)
            )
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        h = self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + (h * self.ls1["gamma"] if self.scaled else h)
        h = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return x + (h * self.ls2["gamma"] if self.scaled else h)


class FrozenViT(nn.Module):
    """Tokens of images at several depths; never trained, always in evaluation mode.

    Args:
        entries: of the published network.
        size: side in pixels of what it is given, a multiple of the patch size; positions are resized to it.

    Raises:
        KeyError, RuntimeError: entries are missing or do not fit each other.
        ValueError: `size` is no multiple of the patch size.
    """

    mean: Tensor
    std: Tensor
    activation_checkpointing = False  # where the images get a gradient, run each block again for it

    def __init__(self, entries: Mapping[str, Tensor], size: int) -> None:
        super().__init__()
        weight, positions = entries["patch_embed.proj.weight"], entries["pos_embed"]
        self.channels, self.patch, self.size = weight.shape[0], weight.shape[-1], size
        if size % self.patch:
            raise ValueError(
                f"the ViT's input must be a multiple of its patches of {self.patch} pixels, got {size}"
            )
        self.depth = 1 + max(int(name.split(".")[1]) for name in entries if name.startswith("blocks."))
        hidden, scaled = entries["blocks.0.mlp.fc1.weight"].shape[0], "blocks.0.ls1.gamma" in entries
        registers = entries.get("register_tokens")
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, self.channels, self.patch, self.patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.channels))
        self.pos_embed = nn.Parameter(_resized(positions.float(), size // self.patch, registers is not None))
        self.registers = None if registers is None else nn.Parameter(torch.zeros_like(registers))
        self.blocks = nn.ModuleList(Block(self.channels, hidden, scaled) for _ in range(self.depth))
        self.norm = nn.LayerNorm(self.channels, eps=1e-6)
        own = {name: entries[name] for name in self.state_dict() if name not in ("pos_embed", "registers")}
        if registers is not None:
            own["registers"] = registers
        self.load_state_dict({**own, "pos_embed": self.pos_embed.detach()})
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    @property
    def name(self) -> str:
        """Such as "vit-384/16": channels and patch size."""
        return f"vit-{self.channels}/{self.patch}"

    def digest(self) -> str:
        """Hex digest of the weights, positions resized."""
        return digest_of_entries(self.state_dict())

    def train(self, mode: bool = True) -> FrozenViT:
        """Frozen: stays in evaluation mode."""
        return super().train(False)

    def fitted(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) as (B, 3, size, size): the mean over areas, or from smaller images bicubic."""
        if images.shape[-1] == self.size:
            return images
        mode = "area" if images.shape[-1] > self.size else "bicubic"
        return F.interpolate(images, (self.size, self.size), mode=mode)

    def forward(self, images: Tensor, after: Sequence[int] = ()) -> list[Tensor]:
        """
        Args:
            images: (B, 3, size, size) in [-1, 1].
            after: indices of blocks, in order.

        Returns:
            Tokens before the first block, after each of these blocks, and normed after the last one, (B, 1 + N, C)
            each: the class token, and one of each of N patches.
        """
        with torch.autocast(images.device.type, enabled=False):
            x = ((images.float() + 1) / 2 - self.mean) / self.std
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2).float()  # (B, N, C)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        found, extra = [x], 0
        if self.registers is not None:
            extra = self.registers.shape[1]
            x = torch.cat([x[:, :1], self.registers.expand(len(x), -1, -1), x[:, 1:]], 1)
        again = self.activation_checkpointing and x.requires_grad
        for n, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
            if n in after:
                found.append(_without(x, extra))
        return [*found, _without(self.norm(x), extra)]


def _without(x: Tensor, registers: int) -> Tensor:
    """Tokens without those of registers, which stand behind the class token."""
    return torch.cat([x[:, :1], x[:, 1 + registers :]], 1) if registers else x


def _resized(positions: Tensor, side: int, registers: bool) -> Tensor:
    """Positions (1, 1 + n n, C) of the class token and n x n patches -> (1, 1 + side side, C), as published.

    DINO, and DINOv2 without registers, step over the table as if it had a tenth of a patch more, unsmoothed.
    """
    first, grid = positions[:, :1], positions[:, 1:]
    before = round(grid.shape[1] ** 0.5)
    if before == side:
        return positions
    maps = grid.unflatten(1, (before, before)).permute(0, 3, 1, 2)
    if registers:
        maps = F.interpolate(maps, (side, side), mode="bicubic", antialias=True)
    else:
        maps = F.interpolate(maps, scale_factor=(side + 0.1) / before, mode="bicubic")
    return torch.cat([first, maps.flatten(2).transpose(1, 2)], 1)


def load_vit(path: str, size: int) -> FrozenViT:
    """The ViT of a `.pth` or safetensors file of DINO, DINOv2 or timm, for input of `size` pixels a side.

    Raises:
        CheckpointError: the file is missing, broken, or holds no such network.
        ValueError: `size` does not fit.
    """
    entries = {name.removeprefix("backbone."): t for name, t in read_entries(path, WRAPPINGS).items()}
    try:
        return FrozenViT(entries, size)
    except (KeyError, RuntimeError, IndexError) as error:
        names = ", ".join(list(entries)[:3])
        raise CheckpointError(
            f"{path} must hold a ViT as published by DINO or DINOv2 (patch_embed.proj.weight, pos_embed, "
            f"blocks.0.attn.qkv.weight ...), got {names} ...: {error}"
        ) from error
