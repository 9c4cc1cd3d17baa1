"""What is known of a million picture files without opening them: an `Index`, made once and kept on disk.

It holds name, size, label and a digest of each file, so a data set opens without a look at its files. The index is
kept in the folder `VAR_EXT_CACHE` (default: ~/.cache/var_ext) under the place of the files, and is used again while the
sizes and times of its stamped files and folders stay as they were. Of several processes, one makes it and the others
wait for it.
"""

import hashlib
import logging
import os
import secrets
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload
from zipfile import BadZipFile

import numpy as np
from filelock import FileLock

from var_ext.data.dataset import DataError, readable, stable_order
from var_ext.data.reading import Look
from var_ext.paths import user_path

log = logging.getLogger(__name__)

FORMAT = "1"  # of the files; an index of another format is made again
VAL_SHARE = 0.1
RACY = (
    10**9
)  # ns; clocks are coarse: what changed this shortly before the search may have changed again, unseen
SHOWN = 8  # broken files that a message names


class Names(Sequence[str]):
    """Strings of a file system in one block of memory."""

    def __init__(self, block: np.ndarray, ends: np.ndarray) -> None:
        self.block, self.ends = block, ends  # (bytes,) uint8, (N,) int64

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        raw = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(name) for name in raw], dtype=np.int64)
        return cls(np.frombuffer(b"".join(raw), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> "list[str]": ...
    def __getitem__(self, i: int | slice) -> "str | list[str]":
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        return os.fsdecode(self.block[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes())


class Entry(NamedTuple):
    """A picture found: `place` is whatever finds it again, two whole numbers."""

    name: str
    label: int
    place: tuple[int, int]
    look: Look | DataError


@dataclass
class Found:
    """What a search for pictures yields; `entries` are looked at as they are drawn.

    `stamps` are paths whose size and time change if the pictures do.
    """

    classes: list[str]
    entries: Iterable[Entry]
    stamps: list[Path]


@dataclass
class Index:
    """Pictures in the order of their search.

    Attributes:
        classes: a name per class.
        names: name of each picture, unique.
        labels, sizes: class, and bytes of the file, (N,) int64.
        digests: of the first bytes of each file, (N, 16) uint8.
        places: (N, 2) int64.
        plain: whether all ways to read a picture agree, (N,) bool.
        stamps: the paths that tell whether the index is up to date,
        stamped: their size and time in ns, (M, 2) int64.
        made: when the search began and ended, in ns, (2,) int64.
    """

    classes: Names
    names: Names
    labels: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray
    places: np.ndarray
    plain: np.ndarray
    stamps: Names
    stamped: np.ndarray
    made: np.ndarray

    @classmethod
    def of(cls, found: Found) -> "Index":
        """Looks at all pictures. Raises DataError if one is broken, naming up to 8."""
        began = time.time_ns()
        names: list[str] = []
        broken: list[Entry] = []
        numbers, digests = array("q"), bytearray()  # far smaller than a million objects
        for entry in found.entries:
            if isinstance(entry.look, DataError):
                broken.append(entry)
            else:
                names.append(entry.name)
                numbers.extend((entry.label, entry.look.size, *entry.place, entry.look.plain))
                digests += entry.look.digest
        if broken:
            others = [readable(entry.name) for entry in broken[1:SHOWN]] + ["..."] * (len(broken) > SHOWN)
            more = f"; {len(broken) - 1} more are broken: {', '.join(others)}" if others else ""
            raise DataError(f"{broken[0].look}{more}")
        table = np.array(numbers, np.int64).reshape(-1, 5)
        return cls(
            classes=Names.of(found.classes),
            names=Names.of(names),
            labels=table[:, 0].copy(),
            sizes=table[:, 1].copy(),
            digests=np.frombuffer(bytes(digests), np.uint8).reshape(-1, 16),
            places=table[:, 2:4].copy(),
            plain=table[:, 4].astype(bool),
            stamps=Names.of(map(str, found.stamps)),
            stamped=_stamped(found.stamps),
            made=np.array([began, time.time_ns()]),
        )

    def fresh(self) -> bool:
        """Whether nothing stamped has changed since."""
        with suppress(OSError):
            now = _stamped(map(Path, self.stamps))
            early, late = self.made[0] - RACY, self.made[1] + RACY
            racy = (early < now[:, 1]) & (now[:, 1] < late)
            return bool((now == self.stamped).all() and not racy.any())
        return False

    def split_rows(self, split: str, place: str) -> np.ndarray:
        """Rows of train or val where the pictures come without splits.

        A tenth of each class is val, at least one picture if it has two; the choice depends only on names.

        Raises:
            DataError: the test split, or no class has two pictures; `place` says of what.
        """
        if split == "test":
            raise DataError(
                f"wanted the splits train, val and test in {place}, got one part, which has no test split"
            )
        held = np.zeros(len(self.names), bool)
        order = np.argsort(self.labels, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(self.labels[order])) + 1):
            count = max(1, round(VAL_SHARE * len(rows))) if len(rows) > 1 else 0
            held[rows[stable_order([self.names[i] for i in rows], "folder")[:count]]] = True
        if not held.any():
            raise DataError(
                f"wanted at least one class with two images in {place}, so that one can validate; got none"
            )
        return np.flatnonzero(held == (split == "val"))

    def digest(self, rows: np.ndarray) -> str:
        """Hex digest of names, labels, sizes and first bytes of some pictures, whatever their places."""
        digest = hashlib.sha256("\0".join(self.names[i] for i in rows).encode(errors="surrogatepass"))
        for column in (self.labels, self.sizes, self.digests):
            digest.update(column[rows].tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Written under another name first, so that no reader sees a part. Raises OSError."""
        columns: dict[str, Any] = {}
        for name, value in vars(self).items():
            packed = (
                {name: value.block, f"{name}_ends": value.ends} if isinstance(value, Names) else {name: value}
            )
            columns |= packed
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            with open(temporary, "xb") as handle:
                np.savez(handle, **columns)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "Index | None":
        """The index in a file; None if there is none, or the file is broken."""
        with suppress(OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile), np.load(path) as file:
            columns: dict[str, Any] = dict(file)
            for name in ("classes", "names", "stamps"):
                columns[name] = Names(columns[name], columns.pop(f"{name}_ends"))
            return cls(**columns)
        return None


def open_index(key: str, search: Callable[[], Found]) -> Index:
    """The index of the pictures at a place.

    Args:
        key: what and where they are; the file of the index is called after its digest.
        search: finds the pictures, if there is no index or it is out of date.

    Raises:
        DataError: of the search, or a picture is broken.
    """
    folder = user_path(os.environ.get("VAR_EXT_CACHE") or "~/.cache/var_ext") / "index"
    digest = hashlib.sha256(f"{FORMAT} {key}".encode(errors="surrogatepass")).hexdigest()
    path = folder / f"{digest[:24]}.npz"
    index = Index.load(path)
    if index is not None and index.fresh():
        return index
    began = time.time_ns()
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{path}.lock"))
        except (OSError, NotImplementedError) as error:
            log.warning("no index is kept, VAR_EXT_CACHE must name a folder for it: %s", error)
            return Index.of(search())
        index = Index.load(path)
        # one that another process made meanwhile is as good as an own
        if index is None or not (index.fresh() or index.made[0] > began):
            index = Index.of(search())
            seconds = (index.made[1] - index.made[0]) / 1e9
            log.info("looked at %d pictures in %.0f s; index: %s", len(index.names), seconds, path)
            try:
                index.save(path)
            except OSError as error:
                log.warning("the index of %d pictures is not kept: %s", len(index.names), error)
    return index


def _stamped(paths: Iterable[Path]) -> np.ndarray:
    stats = [os.stat(path) for path in paths]
    return np.array([(stat.st_size, stat.st_mtime_ns) for stat in stats], np.int64).reshape(-1, 2)
