"""Workers: the same batches, from wherever they begin, and errors as they are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from var_ext.data import DataError, ImageLoader, load_dataset, normalized
from var_ext.data.dataset import ImageDataset


@pytest.fixture
def data(tmp_path: Path) -> ImageDataset:
    rng = np.random.default_rng(0)
    for i in range(90):
        path = tmp_path / "pictures" / f"c{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)).save(path)
    return load_dataset(tmp_path / "pictures", "train", 8, augment=1)


def test_workers_change_nothing_and_live_on(data: ImageDataset) -> None:
    """Batches longer than a chunk and of other lengths, crops that share a decode, a stop in the middle."""
    order = torch.randperm(len(data))
    batches, epochs = order.split(40), (5, 2, 9)
    with_workers, alone = ImageLoader(data, workers=2), ImageLoader(data)
    next(with_workers.batches(batches, [0]))  # and the rest is left
    workers = {process.pid for process in torch.multiprocessing.active_children()}
    found = list(with_workers.batches(batches, epochs))
    assert (
        workers == {process.pid for process in torch.multiprocessing.active_children()} and len(workers) == 2
    )
    for rows, (images, labels), (again, _) in zip(
        batches, found, alone.batches(batches, epochs), strict=True
    ):
        assert images.shape == (len(rows), 3, 3, 8, 8) and images.dtype == torch.float32
        assert torch.equal(images, again) and torch.equal(labels, data.labels[rows])
        for column, epoch in enumerate(epochs):
            assert torch.equal(images[:, column], data.with_epoch(epoch).batch(rows)[0])
    later = list(with_workers.batches(batches[1:], epochs))  # resumed
    assert all(torch.equal(one[0], other[0]) for one, other in zip(found[1:], later, strict=True))


def test_an_error_in_a_worker_keeps_its_kind(data: ImageDataset) -> None:
    path = data.paths[50]  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match=f"{path.name} has changed"):
        list(ImageLoader(data, workers=1).batches(torch.arange(80).split(40), [0]))


def test_reading_leaves_torchs_randomness_alone(data: ImageDataset) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    next(ImageLoader(data).batches([torch.arange(2)], [0]))
    assert torch.equal(torch.rand(2), wanted)


def test_bytes_become_floats_exactly() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(
        normalized(levels), torch.from_numpy(np.arange(256, dtype=np.float32) / np.float32(127.5) - 1)
    )
    floats = torch.rand(3)
    assert normalized(floats) is floats
    assert os.environ["VAR_EXT_CACHE"]  # the tests keep no index among the user's
