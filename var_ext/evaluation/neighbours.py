"""Which training images are nearest to samples, in a feature space or in pixels: are samples copies?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from var_ext.evaluation.feature_store import FeatureStore, Field
from var_ext.evaluation.features import Extractor
from var_ext.evaluation.frechet import pixel_distances
from var_ext.evaluation.image_sources import Images
from var_ext.training.precision import tf32

ROWS = 64  # compared at once: 100 MB in float64 at 256 px, if they are pixels


class Searched:
    """Images to search, in the space of an extractor, or of pixels in [0, 1] where there is none.

    Args:
        images: those that are searched.
        folder: of their features, see `FeatureStore`; not used for pixels.
        batch_size: images computed at once.
    """

    def __init__(self, images: Images, extractor: Extractor | None, folder: Path, *, batch_size: int) -> None:
        self.images, self.extractor, self.batch_size = images, extractor, batch_size
        self.store = (
            None if extractor is None else FeatureStore(folder, images, extractor, batch_size=batch_size)
        )

    def fill(self, *, progress: bool = False) -> None:
        """Computes features that are not there yet; ranks share them. Raises as `FeatureStore.fill`."""
        if self.store is not None:
            self.store.fill("features of training images", progress=progress)

    def rows(self) -> Iterator[Tensor]:
        """All features in order, (b, D) each."""
        if self.store is not None and self.extractor is not None:
            field = Field(self.store, self.extractor.main)
            yield from (field[slice(start, start + ROWS)] for start in range(0, len(field), ROWS))
            return
        for block in self.images.blocks:
            yield from self.features(self.images.load(block)).split(ROWS)

    @torch.inference_mode()
    def features(self, pixels: np.ndarray) -> Tensor:
        """Of images (N, H, W, 3) uint8 at hand: (N, D) float32."""
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        if self.extractor is None:
            return images.flatten(1).float() / 255
        parts = images.split(self.batch_size)
        with tf32(False):  # as the store computes
            return torch.cat([self.extractor.compute(part)[self.extractor.main].cpu() for part in parts])


def nearest(queries: Tensor, blocks: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The nearest rows by L2, from differences, so that a copy is at distance 0.

    Args:
        queries: (N, D).
        blocks: rows (b, D) to search, in order.
        count: how many for each query; fewer if there are not so many.

    Returns:
        distances (N, count) float64, ascending, and places of the rows (N, count) int64.
    """
    found = torch.empty(len(queries), 0, dtype=torch.float64)
    places = torch.empty(len(queries), 0, dtype=torch.int64)
    start = 0
    for rows in blocks:
        here = torch.arange(start, start + len(rows)).expand(len(queries), -1)
        start += len(rows)
        found = torch.cat([found, pixel_distances(queries, rows)], 1)
        places = torch.cat([places, here], 1)
        found, order = found.sort(stable=True, dim=1)  # of equal ones the first
        places = places.gather(1, order)[:, :count]
        found = found[:, :count]
    return found, places
