"""What torch's antialiased bicubic and Pillow's make of pixels and features of `--features vit` and `clip`.

    python benchmarks/vs_pil_bicubic.py                        # two photographs of scikit-learn, random weights
    python benchmarks/vs_pil_bicubic.py --images DIR --vit dinov2_vitl14.pth --clip ViT-L-14.pt

Both take pictures to 224 px: torch's in float32, as this package and EDM2's evaluator (NVlabs/edm2), Pillow's through
uint8, as dgm-eval, DINOv2 and CLIP preprocess. Said is the largest and mean difference of pixels in levels of 255; the
distance of an image's two features over that of two images' features, in the mean; and what the resize moves a Fréchet
distance between two halves of the images by. A trained network in between: `--lite0` takes EfficientNet's weights.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from var_ext.evaluation.clip import load_clip
from var_ext.evaluation.efficientnet_lite0 import read_lite0
from var_ext.evaluation.features import VIT_SIDE
from var_ext.evaluation.frechet import frechet_distance
from var_ext.evaluation.image_sources import open_images
from var_ext.training.frozen_vit import load_vit

CROP = 256
Network = Callable[[Tensor], Tensor]  # (B, 3, 224, 224) in [0, 1] -> (B, D)


@dataclass(frozen=True)
class Shape:
    """Of a transformer."""

    channels: int = 384
    blocks: int = 12
    patch: int = 14


def photographs(count: int) -> np.ndarray:
    """Crops (N, 256, 256, 3) uint8 of scikit-learn's two photographs, half of them each."""
    from sklearn.datasets import load_sample_images

    random, whole = np.random.default_rng(0), load_sample_images().images
    found = []
    for i in range(count):
        picture = whole[i % len(whole)]
        top, left = (random.integers(side - CROP + 1) for side in picture.shape[:2])
        found.append(picture[top : top + CROP, left : left + CROP])
    return np.stack(found)


def by_torch(pixels: np.ndarray) -> Tensor:
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return F.interpolate(x, (VIT_SIDE, VIT_SIDE), mode="bicubic", antialias=True).clamp(0, 1)


def by_pillow(pixels: np.ndarray) -> Tensor:
    side = (VIT_SIDE, VIT_SIDE)
    found = [np.asarray(Image.fromarray(each).resize(side, Image.Resampling.BICUBIC)) for each in pixels]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255


def random_vit(shape: Shape) -> dict[str, Tensor]:
    """Entries of DINOv2's layout: weights of deviation 0.02, and layer scales of 1."""
    c, norms = shape.channels, {"weight": torch.ones, "bias": torch.zeros}

    def normal(*sizes: int) -> Tensor:
        return 0.02 * torch.randn(sizes)

    found = {
        "cls_token": normal(1, 1, c),
        "pos_embed": normal(1, 1 + (VIT_SIDE // shape.patch) ** 2, c),
        "patch_embed.proj.weight": normal(c, 3, shape.patch, shape.patch),
        "patch_embed.proj.bias": torch.zeros(c),
        **{f"norm.{kind}": make(c) for kind, make in norms.items()},
    }
    for n in range(shape.blocks):
        sizes = {"attn.qkv": (3 * c, c), "attn.proj": (c, c), "mlp.fc1": (4 * c, c), "mlp.fc2": (c, 4 * c)}
        for name, size in sizes.items():
            found |= {
                f"blocks.{n}.{name}.weight": normal(*size),
                f"blocks.{n}.{name}.bias": torch.zeros(size[0]),
            }
        for norm in ("norm1", "norm2"):
            found |= {f"blocks.{n}.{norm}.{kind}": make(c) for kind, make in norms.items()}
        found |= {f"blocks.{n}.{scale}.gamma": torch.ones(c) for scale in ("ls1", "ls2")}
    return found


def random_clip(shape: Shape) -> dict[str, Tensor]:
    """Entries of OpenAI's layout, likewise."""
    c, places = shape.channels, 1 + (VIT_SIDE // shape.patch) ** 2

    def normal(*sizes: int) -> Tensor:
        return 0.02 * torch.randn(sizes)

    found = {
        "class_embedding": normal(c),
        "conv1.weight": normal(c, 3, shape.patch, shape.patch),
        "positional_embedding": normal(places, c),
        "proj": c**-0.5 * torch.randn(c, 512),
    }
    norms = ["ln_pre", "ln_post"]
    for n in range(shape.blocks):
        block = f"transformer.resblocks.{n}"
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
        found |= {
            f"{block}.attn.in_proj_weight": normal(3 * c, c),
            f"{block}.attn.in_proj_bias": torch.zeros(3 * c),
        }
        sizes = {"attn.out_proj": (c, c), "mlp.c_fc": (4 * c, c), "mlp.c_proj": (c, 4 * c)}
        for name, size in sizes.items():
            found |= {f"{block}.{name}.weight": normal(*size), f"{block}.{name}.bias": torch.zeros(size[0])}
    for norm in norms:
        found |= {f"{norm}.weight": torch.ones(c), f"{norm}.bias": torch.zeros(c)}
    return {f"visual.{name}": entry for name, entry in found.items()}


def networks(options: argparse.Namespace) -> dict[str, Network]:
    """By name, of files or with random weights."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        files, random = {"vit": options.vit, "clip": options.clip}, {}
        for name, entries in {"vit": random_vit(Shape()), "clip": random_clip(Shape(512, patch=32))}.items():
            random[name] = "" if files[name] else ", random weights"
            if not files[name]:
                files[name] = f"{folder}/{name}.pth"
                torch.save(entries, files[name])
        vit, clip = load_vit(str(files["vit"]), VIT_SIDE), load_clip(str(files["clip"]))
    found: dict[str, Network] = {
        f"{vit.name}{random['vit']}": lambda x: vit(x * 2 - 1)[-1][:, 0],
        f"{clip.name}{random['clip']}": clip,
    }
    if options.lite0:
        found["EfficientNet-lite0, trained"] = read_lite0(options.lite0).features
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", help="a folder, or NAME.npz; without it, two photographs of scikit-learn")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--vit", type=Path)
    parser.add_argument("--clip", type=Path)
    parser.add_argument("--lite0", type=Path)
    options = parser.parse_args()
    if options.images:
        images = open_images(options.images)
        pixels = images.load(range(min(options.count, images.count)))
    else:
        pixels = photographs(options.count)
    ours, theirs = by_torch(pixels), by_pillow(pixels)
    levels = 255 * (ours - theirs).abs()
    print(f"{len(pixels)} images of {pixels.shape[2]} x {pixels.shape[1]} to {VIT_SIDE} px")
    print(f"pixels: largest difference {levels.max():.2f} levels of 255, mean {levels.mean():.3f}")
    for name, network in networks(options).items():
        with torch.inference_mode():
            a, b = (torch.cat([network(part) for part in x.split(10)]).double() for x in (ours, theirs))
        apart = torch.cdist(a, a).sum() / (len(a) * (len(a) - 1))
        share = float((a - b).norm(dim=1).mean() / apart)
        half = len(a) // 2
        distance = frechet_distance(a[:half], a[half:])
        moved = frechet_distance(b[:half], a[half:]) / distance - 1
        print(
            f"{name}: features {100 * share:.2g} % of what images lie apart; a distance moves by {100 * moved:.2g} %"
        )


if __name__ == "__main__":
    main()
