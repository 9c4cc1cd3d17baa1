"""Features of images, computed once, block by block, and kept in files: resumable, and shared by ranks.

A block's file is NAME-PLACE.npy, NAME a digest of images, weights and precision; its rows hold the features of an image
and a digest of its pixels. Files are written atomically, so a run that was stopped goes on where it was, and with ranks
block i is made by rank i modulo their number. Every block is computed in the same batches whoever makes it: figures do
not depend on the number of ranks or on interruptions. Pictures of a folder are told by name, size and time of
modification, for to read 150 GB anew would cost as much as what is saved; an .npz by its check sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from var_ext.arrays import map_array
from var_ext.checkpoints import CheckpointError, atomic_write
from var_ext.evaluation.features import Extractor
from var_ext.evaluation.image_sources import Images
from var_ext.export import rank_and_world, wait_for_files
from var_ext.training.precision import tf32

FORMAT = "1"
BATCH = 32  # images computed at once
PATIENCE = 3600.0  # seconds without a new block of another rank
DIGEST = "digest"  # the field of pixels' digests


class FeatureStore:
    """Features of all images of a source.

    Args:
        folder: of the files; created if missing.
        images, extractor: which, of what network.
        batch_size: images computed at once.

    Attributes:
        key: digest of all that features depend on.
    """

    def __init__(
        self, folder: Path, images: Images, extractor: Extractor, *, batch_size: int = BATCH
    ) -> None:
        self.images, self.extractor, self.batch_size = images, extractor, batch_size
        fields = [(name, np.float32, (size,)) for name, size in extractor.fields.items()]
        self.dtype = np.dtype([*fields, (DIGEST, np.uint64, (2,))])
        text = f"{FORMAT} {images.key} {images.count} {extractor.key} {batch_size}"
        self.key = hashlib.sha256(text.encode()).hexdigest()[:24]
        self.blocks = images.blocks
        self.paths = [folder / f"{self.key}-{block.start:08d}.npy" for block in self.blocks]
        self._open: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.images.count

    def fill(self, what: str, *, progress: bool = False, patience: float = PATIENCE) -> None:
        """Makes what is missing in this space alone, see `fill`."""
        fill([self], what, progress=progress, patience=patience)

    def missing(self) -> list[int]:
        """Numbers of this rank's blocks that are not there, or not whole."""
        rank, world = rank_and_world()
        return [i for i in range(rank, len(self.blocks), world) if not self._whole(i)]

    def _compute(self, part: Tensor, rows: np.ndarray, first: int) -> None:
        """Features of pixels (B, 3, H, W) uint8 into (B,) rows; `first` is the number of the first image."""
        for name, features in self.extractor.compute(part).items():
            if not torch.isfinite(features).all():
                raise ValueError(
                    f"features must be finite, got NaN or infinity in {name} of images from {first} on of "
                    f"{self.images.name}: the weights {self.extractor.weights} are broken"
                )
            rows[name] = features.cpu().numpy()

    def _whole(self, i: int) -> bool:
        return self._read(self.blocks[i], self.paths[i]) is not None

    def _read(self, block: range, path: Path) -> np.ndarray | None:
        """The rows of a block mapped from its file, or None if it is not there or not whole."""
        try:
            rows = map_array(path)
        except (OSError, ValueError):
            return None
        return rows if rows.shape == (len(block),) and rows.dtype == self.dtype else None

    def rows(self) -> Iterator[tuple[range, np.ndarray]]:
        """All blocks, mapped. Raises CheckpointError if one is gone."""
        for i, block in enumerate(self.blocks):
            yield block, self._block(i)

    def _block(self, i: int) -> np.ndarray:
        if self._open is None or self._open[0] != i:
            rows = self._read(self.blocks[i], self.paths[i])
            if rows is None:
                raise CheckpointError(
                    f"{self.paths[i]} is gone or damaged: the same command again makes it anew"
                )
            self._open = (i, rows)
        return self._open[1]


def fill(
    stores: Sequence[FeatureStore], what: str, *, progress: bool = False, patience: float = PATIENCE
) -> None:
    """Makes this rank's blocks that are not there; rank 0 then waits for the others'.

    Args:
        stores: of the same images in one or several spaces, in batches of one size: the pixels of a block are read, or
            drawn, once for all that lack it.
        what: is computed, for the progress bar.

    Raises:
        CheckpointError: a file cannot be written, or another rank is lost.
        DataError: an image cannot be read.
        ValueError: features are not finite.
    """
    rank, world = rank_and_world()
    blocks, images = stores[0].blocks, stores[0].images
    lacking: dict[int, list[FeatureStore]] = {}
    for store in stores:
        for i in store.missing():
            lacking.setdefault(i, []).append(store)
    missing = sorted(lacking)
    total, left = sum(map(len, blocks[rank::world])), sum(len(blocks[i]) for i in missing)
    hidden = not progress or rank > 0
    with tqdm(total=total, initial=total - left, desc=what, unit="img", disable=hidden) as bar:
        for i, pixels in zip(missing, _loaded(images, [blocks[i] for i in missing]), strict=True):
            for store, rows in zip(lacking[i], _computed(lacking[i], blocks[i], pixels, bar), strict=True):
                with atomic_write(store.paths[i]) as handle:
                    np.save(handle, rows)
    if rank == 0:
        for store in stores:
            # a damaged one of another rank, which makes it anew, is not there yet
            wait_for_files(store.paths, world, patience, what="blocks of features", there=store._whole)


def _loaded(images: Images, blocks: list[range]) -> Iterator[np.ndarray]:
    """Pixels of these blocks; the next one is read from its files while one is computed."""
    if not images.ahead:
        yield from map(images.load, blocks)
        return
    with ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(images.load, block) for block in blocks[:1]]
        for i in range(len(blocks)):
            pixels = coming.pop().result()
            coming = [reader.submit(images.load, block) for block in blocks[i + 1 : i + 2]]
            yield pixels


@torch.inference_mode()
def _computed(
    stores: Sequence[FeatureStore], block: range, pixels: np.ndarray, bar: tqdm[None]
) -> list[np.ndarray]:
    """The rows of a block in each space."""
    found = [np.zeros(len(block), store.dtype) for store in stores]
    size = stores[0].batch_size
    for start in range(0, len(block), size):
        part = torch.from_numpy(pixels[start : start + size]).permute(0, 3, 1, 2)
        with tf32(False):  # fp32 is what it says, on GPUs too
            for store, rows in zip(stores, found, strict=True):
                store._compute(part, rows[start : start + size], block.start + start)
        bar.update(len(part))
    for i, image in enumerate(pixels):
        digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        for rows in found:
            rows[DIGEST][i] = np.frombuffer(digest, np.uint64)
    return found


class Field:
    """Some or all rows of a field of a store, read when they are asked for.

    Args:
        count: how many rows, evenly spaced; None: all.
    """

    def __init__(self, store: FeatureStore, name: str, count: int | None = None) -> None:
        self.store, self.name = store, name
        total = len(store)
        self.places = np.arange(count or total) * total // (count or total)
        self._starts = np.array([block.start for block in store.blocks])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.take(np.arange(len(self))[rows])

    def take(self, numbers: np.ndarray) -> Tensor:
        """Rows with these numbers, (n, D) float32."""
        places = self.places[numbers]
        found = np.empty((len(places), self.store.dtype[self.name].shape[0]), np.float32)
        block = np.searchsorted(self._starts, places, side="right") - 1
        for i in np.unique(block):
            here = np.flatnonzero(block == i)
            found[here] = self.store._block(int(i))[self.name][places[here] - self._starts[i]]
        return torch.from_numpy(found)
