"""Batches of images for a training: `ImageLoader`."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from var_ext.data.dataset import DataError, ImageDataset, normalized

CHUNK = 32  # images that a worker reads at once: a batch is shared by the workers, and few wait in memory


class _Key(NamedTuple):
    indices: list[int]
    epochs: Sequence[int]


class _Chunks(Dataset[Tensor | DataError]):
    def __init__(self, data: ImageDataset) -> None:
        self.data = data

    def __getitem__(self, key: _Key) -> Tensor | DataError:
        try:
            return self.data.read(*key)
        except DataError as error:
            return error  # raised in a worker, it would reach the user as traceback text


class _Order(Sampler[_Key]):
    """The chunks to read, in order; set anew for each epoch, under the eyes of workers that stay alive."""

    def __init__(self) -> None:
        self.keys: list[_Key] = []

    def __iter__(self) -> Iterator[_Key]:
        return iter(self.keys)


class ImageLoader:
    """Reads batches of images, with worker processes that live as long as the loader.

    Any batch may be asked for at any time, so a run resumes in the middle of an epoch without reading what came before.
    Pixels travel as uint8 where the data set has them, from pinned memory to a GPU, and become floats there.

    Args:
        data: the images.
        workers: processes that read; 0 reads in this one. Their number does not change the images.
        device: where the images go.
    """

    def __init__(self, data: ImageDataset, *, workers: int = 0, device: torch.device | str = "cpu") -> None:
        self.data, self.device = data, torch.device(device)
        self._order = _Order()
        self._loader = DataLoader(
            _Chunks(data),
            sampler=self._order,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # of seeds that nothing here uses; not torch's own, which the trainer uses
        )

    def batches(self, batches: Iterable[Tensor], epochs: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over images (B, E, 3, S, S) float32 in [-1, 1] and labels (B,) int64 on the device.

        Args:
            batches: indices (B,) int64 of each batch.
            epochs: the E augmented versions wanted of each image; they share a decode.

        Raises:
            DataError: an image is broken.
        """
        split = [rows.split(CHUNK) for rows in batches]
        self._order.keys = [_Key(rows.tolist(), epochs) for parts in split for rows in parts]
        chunks = iter(self._loader)
        for parts in split:
            labels = self.data.labels[torch.cat(parts)]
            images = torch.cat([self._moved(next(chunks)) for _ in parts])
            yield normalized(images), labels.to(self.device)

    def _moved(self, chunk: Tensor | DataError) -> Tensor:
        if isinstance(chunk, DataError):
            raise DataError(str(chunk))  # raised itself, it would hold this frame, and thereby the workers
        return chunk.to(self.device, non_blocking=True)
