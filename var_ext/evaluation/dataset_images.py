"""Images of a data set, as a model is trained on them, to be measured as those of files are."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from var_ext.data import DataError, ImageDataset
from var_ext.evaluation.image_sources import Images
from var_ext.evaluation.tokenizer import evenly


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
