"""The image tower of CLIP (arXiv 2103.00020), a feature space; weights are a user's file.

Entries have OpenAI's names (`visual.conv1.weight` ...) or those of transformers (`vision_model.embeddings ...`). Width,
depth, patch and input size follow from the shapes; heads have 64 channels, and the activation is x sigmoid(1.702 x).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from var_ext.checkpoints import CheckpointError, read_entries

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of input in [0, 1]
HEAD = 64  # channels
OPENAI, TRANSFORMERS = "visual.", "vision_model."
TOP = {  # of transformers -> OpenAI's
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",  # so spelt there
    "post_layernorm": "ln_post",
}
LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


class Block(nn.Module):
    """Attention and MLP, each after a norm and added: (B, N, C) -> (B, N, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn = nn.MultiheadAttention(channels, channels // HEAD, batch_first=True)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(channels, 4 * channels), "c_proj": nn.Linear(4 * channels, channels)}
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))


class ClipImages(nn.Module):
    """Embeddings of images; never trained, always in evaluation mode.

    Args:
        entries: in OpenAI's names, without "visual.".

    Raises:
        KeyError, RuntimeError: entries are missing or do not fit each other.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, entries: Mapping[str, Tensor]) -> None:
        super().__init__()
        weight, positions = entries["conv1.weight"], entries["positional_embedding"]
        self.channels, self.patch = weight.shape[0], weight.shape[-1]
        self.size = self.patch * round((len(positions) - 1) ** 0.5)
        self.embedding = entries["proj"].shape[1]
        blocks = {name.split(".")[2] for name in entries if name.startswith("transformer.resblocks.")}
        self.conv1 = nn.Conv2d(3, self.channels, self.patch, self.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(self.channels))
        self.positional_embedding = nn.Parameter(torch.zeros_like(positions, dtype=torch.float32))
        self.ln_pre, self.ln_post = nn.LayerNorm(self.channels), nn.LayerNorm(self.channels)
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.Sequential(*(Block(self.channels) for _ in blocks))}
        )
        self.proj = nn.Parameter(torch.zeros(self.channels, self.embedding))
        self.load_state_dict({name: entries[name] for name in self.state_dict()})
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    @property
    def name(self) -> str:
        """Such as "clip-768/32": channels and patch size."""
        return f"clip-{self.channels}/{self.patch}"

    def forward(self, images: Tensor) -> Tensor:
        """The image embedding, projected, not normalized: (B, 3, size, size) in [0, 1] -> (B, D)."""
        x = self.conv1((images - self.mean) / self.std).flatten(2).transpose(1, 2)  # (B, N, C)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.transformer["resblocks"](self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


def load_clip(path: str) -> ClipImages:
    """The image tower of a `.pth` or safetensors file of CLIP, in OpenAI's names or those of transformers.

    Raises:
        CheckpointError: the file is missing, broken, or holds no such network.
    """
    entries = read_entries(path)
    try:
        return ClipImages(_named(entries))
    except (KeyError, RuntimeError, IndexError, ValueError, AssertionError) as error:
        names = ", ".join(list(entries)[:3])
        raise CheckpointError(
            f"{path} must hold the image tower of CLIP (visual.conv1.weight, visual.proj ... or "
            f"vision_model.embeddings.class_embedding, visual_projection.weight ...), got {names} ...: {error}"
        ) from error


def _named(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In OpenAI's names without "visual.", in float32."""
    whole = {name: entry.float() for name, entry in entries.items() if entry.is_floating_point()}
    own = {name.removeprefix(OPENAI): entry for name, entry in whole.items() if name.startswith(OPENAI)}
    if own:
        return own
    found: dict[str, Tensor] = {}
    for name, entry in whole.items():
        if not name.startswith(TRANSFORMERS):
            continue
        rest = name.removeprefix(TRANSFORMERS)
        if rest.startswith("encoder.layers."):
            _, _, number, part = rest.split(".", 3)
            found[f"transformer.resblocks.{number}.{_renamed(part, LAYER)}"] = entry
        else:
            found[_renamed(rest, TOP)] = entry
    for number in {name.split(".")[2] for name in found if name.startswith("transformer.")}:
        for kind in ("weight", "bias"):
            at = f"transformer.resblocks.{number}."
            parts = [found.pop(f"{at}self_attn.{each}_proj.{kind}") for each in "qkv"]
            found[f"{at}attn.in_proj_{kind}"] = torch.cat(parts)
    found["proj"] = whole["visual_projection.weight"].T
    return found


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for theirs, ours in table.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    return name
