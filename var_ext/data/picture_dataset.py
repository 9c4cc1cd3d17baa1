"""Picture files with labels, wherever they lie: `PictureDataset`.

To add a place: subclass it, find the pictures for `open_index`, and implement `file`.
"""

import logging
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from var_ext.data.dataset import ImageDataset, check_split, readable
from var_ext.data.framing import central_crop, check_choices, random_crop, resized_pixels
from var_ext.data.index import Index
from var_ext.data.reading import File

log = logging.getLogger(__name__)


class PictureDataset(ImageDataset):
    """Pictures of an index; shorter side to 1.125 x `image_size`, then a crop, no flip.

    The crop is random where `augment` > 0 and central otherwise. One decode serves the crops of several epochs.

    Attributes:
        geometry: "published" or "upright", see `var_ext.data.framing`.
        decode: "exact" or "fast", likewise.
    """

    def __init__(
        self,
        spec: str,
        split: str,
        image_size: int,
        *,
        augment: float = 0.0,
        seed: int = 0,
        geometry: str = "published",
        decode: str = "exact",
    ) -> None:
        check_split(split)
        check_choices(geometry, decode)
        self.spec, self.split, self.image_size = spec, split, image_size
        self.augment, self.seed = float(augment), seed
        self.geometry, self.decode = geometry, decode

    def use(self, index: Index, rows: np.ndarray, classes: list[str], labels: np.ndarray) -> None:
        """Take some rows of an index, with their labels."""
        self.index, self.rows = index, rows
        self.class_names, self.labels = [readable(name) for name in classes], torch.from_numpy(labels)
        ambiguous = rows[~index.plain[rows]]
        if self.geometry == "published" and len(ambiguous):
            log.warning(
                "%d of %d pictures of %s are turned by EXIF, partly transparent or of more than 8 bits, such as %s: "
                "geometry='published' ignores that, geometry='upright' shows them as a viewer does",
                len(ambiguous), len(rows), self.spec, readable(index.names[ambiguous[0]]),
            )  # fmt: skip

    @abstractmethod
    def file(self, row: int) -> File:
        """The file of a row of the index, ready to be read."""

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int, epochs: Sequence[int]) -> Tensor:
        pixels = resized_pixels(self.file(self.rows[index]), self.image_size, self.geometry, self.decode)
        size, (height, width) = self.image_size, pixels.shape[1:]
        if self.augment > 0:
            corners = [random_crop(width, height, size, self.rng(index, epoch)) for epoch in epochs]
        else:
            corners = [central_crop(width, height, size)] * len(epochs)
        return torch.stack([pixels[:, top : top + size, left : left + size] for left, top in corners])

    def describe(self) -> Iterable[str]:
        return self.geometry, self.decode, self._digest

    @cached_property
    def _digest(self) -> str:
        return self.index.digest(self.rows)
