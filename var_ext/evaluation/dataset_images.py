"""Images of a data set, as a model is trained on them, to be measured as those of files are."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from var_ext.checkpoints.digests import digest_of_entries
from var_ext.data import DataError, ImageDataset
from var_ext.evaluation.image_sources import Images
from var_ext.evaluation.tokenizer import evenly
from var_ext.export import to_uint8
from var_ext.models import VQVAE


class DatasetImages(Images):
    """Images of one split.

    Args:
        data: the split.
        most: at most so many, evenly spaced in the data, whose classes follow each other; None: all.

    Raises:
        DataError: there are none; when loaded: one is broken.
    """

    def __init__(self, data: ImageDataset, most: int | None = None) -> None:
        if not len(data):
            raise DataError(f"{data.spec} must have images in its split {data.split!r}, got none")
        self.data, self.total = data, len(data)
        self.count = self.total if most is None else min(most, self.total)
        self.places = evenly(self.count, self.total)  # (count,)
        self.name, self.size = f"{data.spec}, split {data.split!r}", (data.image_size, data.image_size)
        self.order, self.labels = "as in the data", data.labels[self.places].tolist()
        self.key = hashlib.blake2b(f"{data.fingerprint()} {self.count}".encode(), digest_size=16).hexdigest()

    def load(self, block: range) -> np.ndarray:
        images, _ = self.data.batch(self.places[block.start : block.stop])  # (b, 3, S, S) in [-1, 1]
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).numpy()


class ReconstructedImages(Images):
    """What a tokenizer gives back of images of its size, as the bytes of an export.

    Args:
        images: those.
        vae: on any device; left there, in evaluation mode.

    Raises:
        ValueError: the images have another size.
    """

    def __init__(self, images: DatasetImages, vae: VQVAE, batch_size: int = 32) -> None:
        side = vae.image_size
        if images.size != (side, side):
            height, width = images.size
            raise ValueError(f"images must be of the tokenizer's {side} x {side}, got {width} x {height}")
        self.images, self.vae, self.batch_size = images, vae.eval(), batch_size
        self.name, self.size, self.count = f"reconstructions of {images.name}", images.size, images.count
        self.order, self.labels = images.order, images.labels
        text = f"{images.key} {digest_of_entries(vae.state_dict())} {batch_size}"
        self.key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @torch.inference_mode()
    def load(self, block: range) -> np.ndarray:
        device = next(self.vae.parameters()).device
        pixels = torch.from_numpy(self.images.load(block)).permute(0, 3, 1, 2)
        parts = []
        for part in pixels.split(self.batch_size):
            found, _ = self.vae.reconstruct(part.to(device).float() / 127.5 - 1)  # (b, 3, S, S)
            parts.append(to_uint8((found.float().clamp(-1, 1) + 1) / 2).cpu().numpy())
        return np.concatenate(parts)
