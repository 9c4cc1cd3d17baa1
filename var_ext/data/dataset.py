"""The interface of labelled image data sets for training and evaluation.

To add a source: subclass `ImageDataset`, fill the attributes in `__init__`, implement `__len__`, `load` and
`describe`, and let `load_dataset` in `var_ext/data/__init__.py` recognise its spec. Keep `load` a pure
function of (seed, epoch, index): the trainers rely on it to resume a killed run exactly.
"""

import copy
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}  # elsewhere


class DataError(ValueError):
    """A data set cannot be used; the message says what was expected and what was found."""


class ImageDataset(ABC):
    """Images (3, S, S) float32 in [-1, 1] with labels 0..num_classes-1.

    Attributes:
        spec: what `load_dataset` was asked for, such as "digits" or a folder.
        split: "train", "val" or "test".
        image_size: side S in pixels.
        augment: strength of the augmentation, 0 is none.
        seed: seed of the augmentation.
        epoch: which augmented version of each image `[i]` returns; see `with_epoch`.
        labels: label of every image, (N,) int64.
        class_names: a name per class.
    """

    spec: str
    split: str
    image_size: int
    augment: float = 0.0
    seed: int = 0
    epoch: int = 0
    labels: Tensor
    class_names: list[str]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int, epochs: Sequence[int]) -> Tensor:
        """Image `index` as it is in each of `epochs`: (E, 3, S, S), float32 in [-1, 1] or uint8 (see `normalized`)."""

    @abstractmethod
    def describe(self) -> Iterable[str]:
        """Strings that together identify the images of this split, without epoch and augmentation."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        return normalized(self.load(index, [self.epoch])[0]), int(self.labels[index])

    def read(self, indices: Sequence[int], epochs: Sequence[int]) -> Tensor:
        """Images (B, E, 3, S, S) at `indices` in each of `epochs`, as `load` gives them."""
        return torch.stack([self.load(i, epochs) for i in indices])

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) float32 and labels (B,) int64 at `indices`."""
        picked = [int(i) for i in indices]
        return normalized(self.read(picked, [self.epoch])[:, 0]), self.labels[picked]

    def with_epoch(self, epoch: int) -> "Self":
        """A shallow copy with the augmentation of `epoch`."""
        other = copy.copy(self)
        other.epoch = epoch
        return other

    def rng(self, index: int, epoch: int) -> np.random.Generator:
        """The random stream of one image in one epoch."""
        return np.random.default_rng([self.seed, epoch, index])

    def fingerprint(self) -> str:
        """Hex digest that changes whenever the images of this split may have changed."""
        digest = hashlib.sha256()
        header = (
            type(self).__name__,
            self.split,
            str(self.image_size),
            f"{float(self.augment)}",
            str(self.seed),
        )
        for part in (*header, *self.describe()):
            digest.update(_bytes(part) + b"\0")
        return digest.hexdigest()


def normalized(images: Tensor) -> Tensor:
    """uint8 images in 0..255 as float32 in [-1, 1], on their device; float32 images as they are."""
    if images.dtype != torch.uint8:
        return images
    # a divisor on the device: CUDA would multiply by the reciprocal of a number, which rounds differently
    return images.float().div_(torch.full((), 127.5, device=images.device)).sub_(1)


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


def stable_order(keys: Sequence[str], salt: str) -> list[int]:
    """A fixed shuffle of range(len(keys)): by SHA-256, so that no library version changes a split."""
    return sorted(range(len(keys)), key=lambda i: hashlib.sha256(_bytes(f"{salt}/{keys[i]}")).digest())


def readable(name: str) -> str:
    """A file's name as text that can be printed and drawn: bytes that are not UTF-8 as \\xNN."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _bytes(text: str) -> bytes:
    """UTF-8; file names that are not keep Python's raw bytes."""
    return text.encode(errors="surrogatepass")
