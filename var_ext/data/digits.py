"""The 1797 real handwritten digits of scikit-learn (8x8, 17 gray levels), enlarged to the size of the model.

To use another small array data set, copy this file: only `_read` and the split sizes are specific to the
digits.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from var_ext.data.dataset import DataError, ImageDataset, check_split, stable_order

VAL_PER_CLASS = 20
TEST_PER_CLASS = 40
# Augmentation at strength 1: small compared with the spread of real handwriting, to keep its statistics.
MAX_ROTATION = math.radians(8.0)
MAX_SHIFT = 1 / 16  # of the image side: half a pixel of the 8x8 originals
MAX_SCALE = 0.06


@lru_cache(maxsize=1)
def _read() -> tuple[Tensor, Tensor]:
    """All originals (1797, 8, 8) float32 in [-1, 1] and labels (1797,) int64."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the data set 'digits' is part of scikit-learn, which is missing: pip install 'var_ext[digits]'"
        ) from error
    bunch = load_digits()
    images = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32)) / 8 - 1
    return images, torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))


def digits_split(split: str) -> list[int]:
    """Indices into scikit-learn's array: 1197 train, 200 val, 400 test (20 and 40 per class); never changes."""
    check_split(split)
    labels = _read()[1].tolist()
    order = stable_order([str(i) for i in range(len(labels))], "digits")
    taken: list[int] = []
    for label in sorted(set(labels)):
        members = [i for i in order if labels[i] == label]
        cuts = {
            "test": members[:TEST_PER_CLASS],
            "val": members[TEST_PER_CLASS : TEST_PER_CLASS + VAL_PER_CLASS],
            "train": members[TEST_PER_CLASS + VAL_PER_CLASS :],
        }
        taken += cuts[split]
    return sorted(taken)


def enlarge(images: Tensor, size: int, theta: Tensor | None = None) -> Tensor:
    """Bicubic enlargement (N, 8, 8) -> (N, 3, size, size), clamped to [-1, 1].

    `theta` (N, 2, 3) maps output to input coordinates in the same, single resampling; the identity map gives
    exactly what None gives, so augmented digits are as sharp as plain ones.
    """
    small = images[:, None]  # (N, 1, 8, 8)
    if theta is None:
        big = F.interpolate(small, size=(size, size), mode="bicubic", align_corners=False)
    else:
        grid = F.affine_grid(theta, [len(images), 1, size, size], align_corners=False)  # (N, size, size, 2)
        big = F.grid_sample(small, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return big.clamp(-1, 1).expand(-1, 3, -1, -1)


class DigitsDataset(ImageDataset):
    """scikit-learn's digits with a fixed stratified split; see `ImageDataset`."""

    def __init__(self, split: str, image_size: int, *, augment: float = 0.0, seed: int = 0) -> None:
        self.spec, self.split, self.image_size = "digits", split, image_size
        self.augment, self.seed = float(augment), seed
        self.indices = digits_split(split)
        images, labels = _read()
        self.originals = images[self.indices]  # (N, 8, 8)
        self.labels = labels[self.indices]
        self.class_names = [str(i) for i in range(10)]

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int, epochs: Sequence[int]) -> Tensor:
        return self.read([index], epochs)[0]

    def read(self, indices: Sequence[int], epochs: Sequence[int]) -> Tensor:
        originals = self.originals[list(indices)].repeat_interleave(len(epochs), 0)  # (B E, 8, 8)
        theta = None
        if self.augment > 0:
            theta = torch.cat([self._affine(i, epoch) for i in indices for epoch in epochs])  # (B E, 2, 3)
        return enlarge(originals, self.image_size, theta).unflatten(0, (len(indices), len(epochs)))

    def describe(self) -> Iterable[str]:
        yield hashlib.sha256(self.originals.numpy().tobytes()).hexdigest()
        yield ",".join(map(str, self.indices))

    def _affine(self, index: int, epoch: int) -> Tensor:
        """A small rotation, scale and shift, (1, 2, 3)."""
        turn, scale_x, scale_y, shift_x, shift_y = self.rng(index, epoch).uniform(-1, 1, 5) * self.augment
        angle, shift = turn * MAX_ROTATION, 2 * MAX_SHIFT  # affine_grid's coordinates span [-1, 1]
        cos, sin = math.cos(angle), math.sin(angle)
        wide, high = 1 + MAX_SCALE * scale_x, 1 + MAX_SCALE * scale_y
        rows = [[cos * wide, -sin * high, shift * shift_x], [sin * wide, cos * high, shift * shift_y]]
        return torch.tensor([rows], dtype=torch.float32)
