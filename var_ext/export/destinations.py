"""Where exported images go: a folder of PNGs, or one .npz as the ADM evaluation suite reads it; and where scores go.

Folder and .npz hold the same pixels. Files of a part are written atomically, and their length is checked
before they count as done.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from PIL import Image
from torch import Tensor, uint8

from var_ext.arrays import map_array
from var_ext.checkpoints import CheckpointError, atomic_write, clear_remains
from var_ext.export.plan import Plan
from var_ext.paths import user_path

log = logging.getLogger(__name__)

PLAN = "plan.json"
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\0\0\0\0IEND\xaeB`\x82"


def to_uint8(images: Tensor) -> Tensor:
    """(B, 3, S, S) in [0, 1] -> (B, S, S, 3) uint8: 255 times the value, truncated.

    As in the published code, so that figures are comparable. Values outside are clipped.
    """
    return images.clamp(0, 1).mul(255).to(uint8).permute(0, 2, 3, 1).contiguous()


class Place(ABC):
    """Where what is made of the images of a plan goes.

    Args:
        path: the folder or file.
        plan: which images.
    """

    plan_file: Path
    what = "images"

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan = path, plan

    @abstractmethod
    def check(self) -> None:
        """Raises CheckpointError if something else is in its place."""

    @abstractmethod
    def complete(self, part: range) -> bool:
        """Whether all files of a part are there and complete."""

    @abstractmethod
    def write(self, part: range, values: np.ndarray) -> None:
        """Writes a part: pixels (B, S, S, 3) uint8, or scores (B,) float64. Raises CheckpointError."""

    def finished(self) -> bool:
        """Whether `finish` has run, so that the parts are no longer needed."""
        return False

    @abstractmethod
    def finish(self) -> None:
        """Final step after all parts are complete; called by one rank. Raises CheckpointError."""


class Folder(Place):
    """FOLDER/000000.png and so on, the number is the place in the plan; and FOLDER/plan.json.

    Args:
        path, plan: as of `Place`.
        side: of the images in pixels.
    """

    def __init__(self, path: Path, plan: Plan, side: int) -> None:
        super().__init__(path, plan)
        self.side = side
        self.plan_file = path / PLAN
        self.digits = max(6, len(str(len(plan) - 1)))

    def check(self) -> None:
        _check_folder(self.path, "images")

    def image(self, index: int) -> Path:
        """The file of an image."""
        return self.path / f"{index:0{self.digits}d}.png"

    def complete(self, part: range) -> bool:
        return all(self._whole(index) for index in part)

    def _whole(self, index: int) -> bool:
        """Begins as a PNG of the right size and ends as a PNG: not cut short."""
        size = self.side.to_bytes(4, "big")
        try:
            with open(self.image(index), "rb") as handle:
                start = handle.read(24)
                handle.seek(-len(PNG_END), os.SEEK_END)
                return start == PNG_START + size + size and handle.read() == PNG_END
        except OSError:
            return False

    def write(self, part: range, values: np.ndarray) -> None:
        missing = [index for index in part if not self._whole(index)]

        def save(index: int) -> None:
            with atomic_write(self.image(index)) as handle:
                # level 1: compression must not slow down sampling
                Image.fromarray(values[index - part.start]).save(handle, format="PNG", compress_level=1)

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # compression releases the GIL
            list(pool.map(save, missing))

    def finish(self) -> None:
        clear_remains(self.path, "*.png")


class Npz(Place):
    """NAME.npz with `arr_0` (N, S, S, 3) uint8, and NAME.npz.plan.json beside it.

    Until all parts are there they are NAME.npz.parts/000000.npy and so on. The file is assembled from them one by
    one, so memory holds one part; meanwhile the disk holds the images twice. Arguments are those of `Folder`.
    """

    def __init__(self, path: Path, plan: Plan, side: int) -> None:
        super().__init__(path, plan)
        self.side = side
        self.plan_file = path.with_name(f"{path.name}.{PLAN}")
        self.parts = path.with_name(f"{path.name}.parts")

    def check(self) -> None:
        if os.path.exists(self.path) and not os.path.exists(self.plan_file):
            raise CheckpointError(
                f"{self.path} is there without {self.plan_file.name}: of which images cannot be told. "
                "Write to another place, or remove it"
            )

    def part(self, part: range) -> Path:
        """The file of a part."""
        return self.parts / f"{part.start // self.plan.batch_size:06d}.npy"

    def complete(self, part: range) -> bool:
        return _holds(self.part(part), self._shape(len(part)), np.uint8)

    def _shape(self, count: int) -> tuple[int, ...]:
        return (count, self.side, self.side, 3)

    def _write_header(self, handle: IO[bytes], count: int) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": self._shape(count)}
        npy.write_array_header_1_0(handle, header)

    def write(self, part: range, values: np.ndarray) -> None:
        with atomic_write(self.part(part)) as handle:
            self._write_header(handle, len(part))
            handle.write(values.reshape(-1).data)  # numpy.save would not report why the disk fails

    def finished(self) -> bool:
        return zipfile.is_zipfile(self.path)  # a truncated file has lost its directory

    def finish(self) -> None:
        if not self.finished():
            try:
                self._assemble()
            except CheckpointError:
                # the same export at the same time may have finished and removed the parts, or a killed one left a
                # file that fills the disk
                if not self.finished():
                    clear_remains(self.path.parent, self.path.name)
                    self._assemble()
        clear_remains(self.path.parent, self.path.name)
        shutil.rmtree(self.parts, ignore_errors=True)
        if self.parts.exists():
            log.warning("could not remove %s, which is no longer needed", self.parts)

    def _assemble(self) -> None:
        # no timestamp: equal images give equal files
        member = zipfile.ZipInfo("arr_0.npy", (1980, 1, 1, 0, 0, 0))
        with (
            atomic_write(self.path) as handle,
            zipfile.ZipFile(handle, "w") as archive,  # not compressed, as numpy.savez writes
            archive.open(member, "w", force_zip64=True) as array,
        ):
            self._write_header(array, len(self.plan))
            for part in self.plan.parts:
                array.write(self._pixels(part))

    def _pixels(self, part: range) -> memoryview:
        return map_array(self.part(part)).reshape(-1).data


class Scores(Place):
    """FOLDER/scores.npy (N,) float64, the scores of the images of a plan, and FOLDER/plan.json.

    Until all parts are there they are FOLDER/000000.npy and so on.
    """

    what = "candidates"

    def __init__(self, path: Path, plan: Plan) -> None:
        super().__init__(path, plan)
        self.plan_file, self.whole = path / PLAN, path / "scores.npy"

    def check(self) -> None:
        _check_folder(self.path, "scores")

    def part(self, part: range) -> Path:
        """The file of a part."""
        return self.path / f"{part.start // self.plan.batch_size:06d}.npy"

    def complete(self, part: range) -> bool:
        return _holds(self.part(part), (len(part),), np.float64)

    def write(self, part: range, values: np.ndarray) -> None:
        _save(self.part(part), values)

    def finished(self) -> bool:
        return _holds(self.whole, (len(self.plan),), np.float64)

    def read(self) -> np.ndarray:
        """All scores (N,) float64, once their parts are complete. Raises CheckpointError."""
        # in this order: another rank may put the parts together and remove them in between
        with suppress(OSError):
            if not self.finished():
                return np.concatenate(
                    [np.empty(0), *(map_array(self.part(part)) for part in self.plan.parts)]
                )
        try:
            return map_array(self.whole).copy()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"could not read {self.whole}: {reason}") from error

    def finish(self) -> None:
        if not self.finished():
            _save(self.whole, self.read())
        for part in self.plan.parts:
            with suppress(OSError):
                self.part(part).unlink()
        clear_remains(self.path, "*.npy")


def place_of(out: str | os.PathLike[str], plan: Plan, side: int) -> Place:
    """A name that ends with .npz is a file, any other a folder."""
    path = user_path(out)
    return (Npz if is_npz(out) else Folder)(path, plan, side)


def is_npz(out: str | os.PathLike[str]) -> bool:
    """Whether a path is meant to be one .npz file of images rather than a folder of them."""
    return os.fspath(out).lower().endswith(".npz")


def _check_folder(folder: Path, what: str) -> None:
    """Raises CheckpointError if a folder holds something, and no plan."""
    # in this order: a rank that is ahead writes plan.json before its first part
    there = sorted(name for name in _listed(folder) if not name.startswith("."))
    if there and not os.path.exists(folder / PLAN):
        raise CheckpointError(
            f"{folder} must be empty or hold {what} of an earlier run with their {PLAN}, "
            f"but holds {', '.join(there[:3])}{', ...' if there[3:] else ''}"
        )


def _holds(file: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> bool:
    """Whether a .npy file is there, of this shape and dtype, and not cut short."""
    try:
        array = map_array(file)  # an error where the file is shorter than its header says
    except (OSError, ValueError):
        return False
    return array.shape == shape and array.dtype == dtype


def _save(file: Path, array: np.ndarray) -> None:
    with atomic_write(file) as handle:
        buffer = io.BytesIO()
        np.save(buffer, array)
        handle.write(buffer.getbuffer())  # numpy.save would not report why the disk fails


def _listed(folder: Path) -> Sequence[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"could not read {folder}: {error.strerror or error}") from error
