"""Images to be measured, block by block: an .npz file, a folder of pictures, or what a model draws on the way."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from var_ext.data import DataError
from var_ext.data.framing import shortened
from var_ext.data.image_folder import IMAGES, SUFFIXES
from var_ext.data.pictures import sides
from var_ext.data.reading import read_published
from var_ext.evaluation.npz import Member, members, whole
from var_ext.export import Plan, is_npz, to_uint8
from var_ext.paths import user_path
from var_ext.sampling import Sampler

BLOCK = 256  # images loaded at once: 50 MB at 256 px
MOST = 2**30  # bytes of a block: larger images come in smaller ones
THREADS = 8  # that decode pictures


class Images(ABC):
    """A row of images of one size.

    Attributes:
        name: what they are, for reports.
        count, size: how many, and (height, width).
        order: what the order is, for reports.
        labels: a class for each, or None where none is known.
        key: digest of what they are, which cached features are found by.
        lossy: how many are JPEG files.
        path: the one file that they are in, if there is one.
        ahead: whether to load a block while the one before it is computed: they come from files.
    """

    name: str
    count: int
    size: tuple[int, int]
    order: str
    labels: Sequence[int] | None = None
    key: str
    lossy: int = 0
    path: Path | None = None
    ahead: bool = True

    @property
    def sides(self) -> str:
        """Their size, as messages say it."""
        return sides(self.size[1], self.size[0])

    @property
    def blocks(self) -> list[range]:
        """Places of the images that are loaded together."""
        step = min(BLOCK, max(1, MOST // (3 * self.size[0] * self.size[1])))
        return [range(start, min(start + step, self.count)) for start in range(0, self.count, step)]

    @abstractmethod
    def load(self, block: range) -> np.ndarray:
        """(len(block), H, W, 3) uint8. Raises DataError."""


class NpzImages(Images):
    """`arr_0` of an .npz file, (N, H, W, 3) uint8, as ADM's evaluator takes it.

    Labels are those of the plan that `var-ext sample` leaves beside it, or `arr_1`, where ADM's script has them.

    Raises:
        DataError: the file is damaged, or the array of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.member = Member(path, "arr_0")
        shape, dtype = self.member.shape, self.member.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
            raise DataError(
                f"{self.member} must be images (N, H, W, 3) uint8 with values 0..255, got {shape} {dtype}"
                + _remedy(shape, dtype)
            )
        if not len(self.member):
            raise DataError(f"{self.member} must have images, got none")
        self.path, self.name, self.count, self.size = path, path.name, shape[0], (shape[1], shape[2])
        self.order, self.key = "as in the file", self.member.key
        self.labels = _planned(path.with_name(f"{path.name}.plan.json"), self.count)
        if self.labels is None and "arr_1" in members(path):
            with suppress(DataError):  # it may be anything, and nothing has to be there
                labels = whole(path, "arr_1")
                if labels.shape == (self.count,) and labels.dtype.kind in "iu":
                    self.labels = labels.tolist()

    def load(self, block: range) -> np.ndarray:
        return self.member[block.start : block.stop]


class FolderImages(Images):
    """Pictures of a folder, or of its class folders, in the order of their names; RGB as the published code reads it.

    Args:
        path: the folder.
        side: crop and resize them as ADM's references were (`adm_crop`); None: all must have one size.

    Raises:
        DataError: no pictures, pictures beside class folders; when loaded: one that is broken or of another size.
    """

    def __init__(self, path: Path, side: int | None = None) -> None:
        self.folder, self.side = path, side
        self.files, classes = _pictures(path)
        self.name, self.count = path.name, len(self.files)
        self.order = "by class folder and name" if classes is not None else "by name"
        self.labels = classes if classes is not None else _planned(path / "plan.json", self.count)
        self.lossy = sum(name.lower().endswith((".jpg", ".jpeg", ".jfif")) for name in self.files)
        first = self._read(0)
        self.size = (first.shape[0], first.shape[1])
        digest = hashlib.blake2b(f"{side}".encode(), digest_size=16)
        for name in self.files:
            stat = os.stat(path / name)
            digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogatepass"))
        self.key = digest.hexdigest()

    def load(self, block: range) -> np.ndarray:
        with ThreadPoolExecutor(THREADS) as pool:
            return np.stack(list(pool.map(self._fitting, block)))

    def _read(self, index: int) -> np.ndarray:
        image = read_published(self.folder / self.files[index])
        return np.asarray(image if self.side is None else adm_crop(image, self.side))

    def _fitting(self, index: int) -> np.ndarray:
        pixels = self._read(index)
        if pixels.shape[:2] != self.size:
            raise DataError(
                f"pictures of {self.folder} must have one size, got {self.sides} first and "
                f"{sides(pixels.shape[1], pixels.shape[0])} in {self.files[index]}: --image-size crops and resizes them"
            )
        return pixels


class DrawnImages(Images):
    """What a model draws, streamed: nothing is kept but features. Bytes are those of `var-ext sample --out NAME.npz`.

    Args:
        sampler: draws them.
        plan: which; a block is some of its parts.
        name: of the model.
    """

    ahead = False

    def __init__(self, sampler: Sampler, plan: Plan, name: str) -> None:
        if not len(plan):
            raise DataError(f"there must be images of {name} to draw, got none")
        record = plan.record(sampler)
        self.sampler, self.plan, self.options = sampler, plan, plan.resolved(sampler)
        self.name, self.count, self.labels = name, len(plan), plan.labels
        self.size = (sampler.image_size, sampler.image_size)
        self.order = "classes take turns"
        text = json.dumps(record, sort_keys=True)
        self.key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def blocks(self) -> list[range]:
        size = max(1, BLOCK // self.plan.batch_size) * self.plan.batch_size
        return [range(start, min(start + size, self.count)) for start in range(0, self.count, size)]

    def load(self, block: range) -> np.ndarray:
        some = slice(block.start, block.stop)
        drawn = self.sampler.stream(
            self.plan.labels[some], self.plan.seeds[some], batch_size=self.plan.batch_size, **self.options
        )
        parts = []
        for _, images in drawn:
            if not torch.isfinite(images).all():
                raise DataError(
                    f"{self.name} drew NaN or infinity among the images {block.start} to {block.stop - 1}"
                )
            parts.append(to_uint8(images).cpu().numpy())
        return np.concatenate(parts)


def open_images(path: str | os.PathLike[str], side: int | None = None) -> Images:
    """Images of an .npz file or a folder.

    Args:
        side: of pictures of a folder, see `FolderImages`; those of a file must have it.

    Raises:
        DataError: see `NpzImages` and `FolderImages`.
    """
    place = user_path(path)
    if is_npz(place):
        images = NpzImages(place)
        if side is not None and images.size != (side, side):
            raise DataError(
                f"only pictures of folders are cropped and resized to {side} pixels, got {place} of "
                f"{images.sides}"
            )
        return images
    if not place.is_dir():
        came = "a file" if place.exists() else "nothing"
        raise DataError(
            f"images must be NAME.npz or a folder of {IMAGES}, got {place}, where there is {came}"
        )
    return FolderImages(place, side)


def adm_crop(image: Image.Image, side: int) -> Image.Image:
    """The middle square at `side` pixels, as ADM's data set has it: halved while twice as large, then bicubic."""
    image = shortened(image)
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    image = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _pictures(folder: Path) -> tuple[list[str], list[int] | None]:
    """Names below the folder, sorted, and the class of each where there are class folders."""
    try:
        there = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        loose = [name for name in there if _is_picture(name)]
        classes = [name for name in there if (folder / name).is_dir()]
        found = {
            name: [f"{name}/{file}" for file in sorted(os.listdir(folder / name)) if _is_picture(file)]
            for name in classes
        }
    except OSError as error:
        raise DataError(f"could not read {folder}: {error.strerror or error}") from error
    found = {name: files for name, files in found.items() if files}
    if loose and found:
        raise DataError(
            f"{folder} must hold pictures or class folders of them, got {loose[0]} beside {next(iter(found))}/"
        )
    if not loose and not found:
        raise DataError(f"{folder} must hold {IMAGES}, got {', '.join(there[:3]) or 'nothing'}")
    if loose:
        return loose, None
    labels = [label for label, files in enumerate(found.values()) for _ in files]
    return [file for files in found.values() for file in files], labels


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _planned(file: Path, count: int) -> Sequence[int] | None:
    """Labels of a plan that an export left, where it is of as many images."""
    try:
        labels = json.loads(file.read_text(encoding="utf-8")).get("labels")
    except (OSError, ValueError, AttributeError):
        return None
    fits = isinstance(labels, list) and len(labels) == count and all(isinstance(x, int) for x in labels)
    return labels if fits else None


def _remedy(shape: tuple[int, ...], dtype: np.dtype) -> str:
    if len(shape) == 4 and shape[1] == 3 and shape[3] != 3:
        return ": move the channels to the end"
    if dtype.kind == "f":
        return ": floats must be scaled to 0..255, clipped and cut to uint8, without NaN"
    return ""
