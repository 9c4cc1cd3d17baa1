"""Feature spaces that images are compared in: Inception's, whose distance alone is called FID, and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from var_ext.checkpoints.digests import digest_of_entries
from var_ext.evaluation.clip import load_clip
from var_ext.evaluation.efficientnet_lite0 import HEAD, SIZE, read_lite0
from var_ext.evaluation.inception import POOL, SPATIAL, InceptionV3
from var_ext.evaluation.inception_weights import find_weights, read_inception
from var_ext.training.precision import tf32

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
VIT_SIDE = 224


@dataclass(frozen=True)
class Space:
    """A fixed feature space for Fréchet distances.

    Attributes:
        name: of the distance in the report, such as "FD-lite0".
        features: images (B, 3, S, S) in [0, 1] -> (B, D).
    """

    name: str
    features: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Extractor:
    """A network that turns pixels into features, and what is said of it beside a figure.

    Attributes:
        titles: names of its figures: of the Fréchet distance by field, such as {"pool": "FID", "spatial": "sFID"}.
        fields: sizes of the features by field; precision, recall and kernel distance are of the first.
        compute: pixels (B, 3, H, W) uint8 -> features (B, D) float32 by field.
        logits: first field (B, D) -> (B, classes), for the Inception Score; None: there is none.
        suffix: of the names of all other figures, such as " (lite0)".
        weights, digest: the file's name, and the digest of the weights.
        precision, resize: how it computes, and how images come to its size.
    """

    titles: Mapping[str, str]
    fields: Mapping[str, int]
    compute: Callable[[Tensor], dict[str, Tensor]]
    logits: Callable[[Tensor], Tensor] | None
    suffix: str
    weights: str
    digest: str
    precision: str
    resize: str

    @property
    def main(self) -> str:
        """The first field."""
        return next(iter(self.fields))

    def space(self) -> Space:
        """Its first field alone, for images in [0, 1] that are multiples of 1/255."""

        def features(images: Tensor) -> Tensor:
            with tf32(False):  # fp32 is what it says, on GPUs too
                return self.compute(images.mul(255).round().to(torch.uint8))[self.main]

        return Space(self.titles[self.main], features)

    @property
    def key(self) -> str:
        """What cached features depend on besides the images."""
        return f"{dict(self.fields)} {self.digest} {self.precision} {self.resize}"


def inception(
    path: str | Path | None = None, *, precision: str = "fp32", device: str | torch.device = "cpu"
) -> Extractor:
    """Inception's space: of FID, sFID and the Inception Score.

    Args:
        path: weights, see `inception_weights`; None: those in the cache of torch.hub.
        precision: "fp32", or "bf16" for convolutions in bfloat16: faster, and not quite the published figures.

    Raises:
        CheckpointError: there are no weights, or others.
    """
    file = find_weights(path)
    return of_inception(read_inception(file), file.name, precision=precision, device=device)


def of_inception(
    network: InceptionV3, weights: str, *, precision: str = "fp32", device: str | torch.device = "cpu"
) -> Extractor:
    """The same of a network at hand. ValueError for an unknown precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"the network's precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    digest = network.digest()
    fast = network.folded(PRECISIONS[precision]).to(device)

    def compute(pixels: Tensor) -> dict[str, Tensor]:
        pool, spatial = fast(pixels.to(device))
        return {"pool": pool, "spatial": spatial}

    return Extractor(
        titles={"pool": "FID", "spatial": "sFID"},
        fields={"pool": POOL, "spatial": SPATIAL},
        compute=compute,
        logits=lambda pool: fast.logits(pool.to(device)),
        suffix="",
        weights=weights,
        digest=digest,
        precision=precision,
        resize="TensorFlow 1 bilinear to 299, (x - 128) / 128",
    )


def lite0(path: str | Path, *, device: str | torch.device = "cpu") -> Extractor:
    """The space of EfficientNet-lite0, which needs no fetched weights. Raises CheckpointError."""
    network = read_lite0(path).to(device)
    space = Space("FD-lite0", network.features)
    digest = digest_of_entries(network.state_dict())
    resize = f"antialiased bilinear to {SIZE}"
    return _of_space(space, HEAD, " (lite0)", Path(path).name, digest, resize, device)


def vit(path: str | Path, *, device: str | torch.device = "cpu") -> Extractor:
    """The space of a DINO or DINOv2 file (arXiv 2306.04675): its normed class token. Raises CheckpointError.

    Resized by torch, as EDM2's evaluator does, not by Pillow, as dgm-eval does: see acceptance.md.
    """
    from var_ext.training.frozen_vit import load_vit

    network = load_vit(str(path), VIT_SIDE).to(device)

    def features(images: Tensor) -> Tensor:
        x = F.interpolate(images, (VIT_SIDE, VIT_SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        return network(x * 2 - 1)[-1][:, 0]

    space = Space(f"FD-{network.name}", features)
    resize = f"antialiased bicubic to {VIT_SIDE}"
    suffix = f" ({network.name})"
    return _of_space(space, network.channels, suffix, Path(path).name, network.digest(), resize, device)


def clip(path: str | Path, *, device: str | torch.device = "cpu") -> Extractor:
    """The space of CLIP's image embeddings (arXiv 2203.06026): projected, not normalized. Raises CheckpointError.

    Resized by torch, not by Pillow, as CLIP's preprocessing does: see acceptance.md.
    """
    network = load_clip(str(path)).to(device)
    side = (network.size, network.size)

    def features(images: Tensor) -> Tensor:
        return network(F.interpolate(images, side, mode="bicubic", antialias=True).clamp(0, 1))

    space = Space(f"FD-{network.name}", features)
    digest, resize = digest_of_entries(network.state_dict()), f"antialiased bicubic to {network.size}"
    return _of_space(space, network.embedding, f" ({network.name})", Path(path).name, digest, resize, device)


def _of_space(
    space: Space, size: int, suffix: str, weights: str, digest: str, resize: str, device: str | torch.device
) -> Extractor:
    return Extractor(
        titles={"pool": space.name},
        fields={"pool": size},
        compute=lambda pixels: {"pool": space.features(pixels.to(device).float() / 255).float()},
        logits=None,
        suffix=suffix,
        weights=weights,
        digest=digest,
        precision="fp32",
        resize=resize,
    )
