"""End to end: pictures of about 110 KB from disk to batches of 256 px, beside plain Pillow in a plain DataLoader."""

from __future__ import annotations

import io
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from harness.case import Case
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from var_ext.data import ImageLoader, load_dataset

SHAPES = {
    "exact, read in the process": dict(decode="exact", workers=0),
    "fast, read in the process": dict(decode="fast", workers=0),
    "exact, 2 workers": dict(decode="exact", workers=2),
    "fast, 2 workers": dict(decode="fast", workers=2),
}
SMOKE = dict(decode="fast", workers=0, pictures=4, batch=2, calls=2)

SIDE = 256
_folder = tempfile.TemporaryDirectory()


def draw(pictures: int) -> Path:
    """A folder of JPEGs of 500 x 375 and similar, of 50 different contents with detail at all scales."""
    os.environ["VAR_EXT_CACHE"] = _folder.name
    root = Path(_folder.name, str(pictures))
    rng, contents = np.random.default_rng(0), []
    for i in range(min(pictures, 50)):
        width, height = ((500, 375), (375, 500), (500, 334))[i % 3]
        pixels = np.full((height, width, 3), 128.0)
        for cells in (4, 16, 64, 250):
            grid = rng.normal(0, 60 / cells**0.35, (cells, cells, 3)).astype(np.float32)
            layers = [
                Image.fromarray(grid[..., c]).resize((width, height), Image.Resampling.BICUBIC)
                for c in range(3)
            ]
            pixels += np.stack([np.asarray(layer) for layer in layers], -1)
        content = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=97)
        contents.append(content.getvalue())
    for i in range(pictures):
        path = root / "train" / "a" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[i % len(contents)])
    return root


class Plain(Dataset[tuple[torch.Tensor, int]]):
    """The published steps, one after the other."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[i]) as file:
            image = file.convert("RGB")
        side, short = round(1.125 * SIDE), min(image.size)
        image = image.resize(
            (int(side * image.width / short), int(side * image.height / short)), Image.Resampling.LANCZOS
        )
        left, top = round((image.width - SIDE) / 2), round((image.height - SIDE) / 2)
        pixels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), np.float32) / np.float32(255)
        return torch.from_numpy(2 * pixels.transpose(2, 0, 1) - 1), 0


def case(decode: str, workers: int, pictures: int = 2000, batch: int = 64, calls: int = 8) -> Case:
    """One call reads `calls` batches, the next ones of the folder, and no worker reads on while the other is timed."""
    data = load_dataset(draw(pictures), "train", SIDE, decode=decode)
    rows = [part for part in torch.arange(len(data)).split(batch) if len(part) == batch]
    groups = [rows[i : i + calls] for i in range(0, len(rows) - calls + 1, calls)]
    ours = ImageLoader(data, workers=workers)
    wanted: list[torch.Tensor] = []
    files = Plain(data.paths)  # type: ignore[attr-defined]
    plain = DataLoader(files, batch_sampler=wanted, num_workers=workers, persistent_workers=workers > 0)

    def turns(
        read: Callable[[list[torch.Tensor]], Iterable[Sequence[torch.Tensor]]],
    ) -> Callable[[], torch.Tensor]:
        """Each call reads the next group."""
        following = itertools.cycle(groups)

        def call() -> torch.Tensor:
            before = torch.get_num_threads()
            torch.set_num_threads(1)  # a core a process
            try:
                wanted[:] = next(following)
                first, *_ = [images for images, _ in read(wanted)]
                return first.view(-1, 3, SIDE, SIDE)[0]
            finally:
                torch.set_num_threads(before)

        return call

    def near(result: torch.Tensor, expected: torch.Tensor) -> None:
        """Equal, or within what the docstring of `var_ext.data.framing` says of 255 levels."""
        torch.testing.assert_close(result, expected, rtol=0, atol=0 if decode == "exact" else 19 / 127.5)

    return Case(
        {"var_ext": turns(lambda rows: ours.batches(rows, [0])), "reference": turns(lambda _: plain)},
        images=calls * batch,
        check=near,
    )
