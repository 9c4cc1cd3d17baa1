"""Arrays inside .npz files: read in slices, without unpickling anything.

numpy.load would hold 10 GB for 50,000 images of 256 px. A member that is not compressed, as numpy.savez writes it, is
mapped from the file; a compressed one is read from front to back.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from var_ext.arrays import HEADER
from var_ext.data import DataError

# what reading a damaged or foreign archive may raise
BROKEN = (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)

ENDS = 1 << 16  # bytes at both ends of a member that its key is made of, with its size and check sum


class Member:
    """An array of an .npz file.

    Attributes:
        shape, dtype: of the array.
        key: digest of its size, its check sum in the archive, and its first and last bytes.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._stream: Any = None
        try:
            with zipfile.ZipFile(path) as archive:
                info = archive.getinfo(f"{name}.npy")
                with archive.open(info) as handle:
                    self.shape, fortran, self.dtype = _header(handle, self)
                    self._header = handle.tell()
            wanted = int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize
            if fortran and len(self.shape) > 1:
                raise DataError(
                    f"{self} must be in C order, got Fortran order: save it by numpy.ascontiguousarray"
                )
            if info.file_size - self._header != wanted:
                raise DataError(
                    f"{self} must have {wanted} bytes for its shape {self.shape}, got {info.file_size - self._header}: "
                    "the file was not written to its end"
                )
            self._map = self._mapped(info) if info.compress_type == zipfile.ZIP_STORED else None
        except KeyError as error:
            raise DataError(
                f"{path} must have an array {name}, got {', '.join(members(path)) or 'none'}"
            ) from error
        except BROKEN as error:
            raise _damaged(path, error) from error
        ends = []
        if self._map is not None:
            flat = self._map.reshape(-1).view(np.uint8)
            ends = [flat[:ENDS].tobytes(), flat[-ENDS:].tobytes()]
        facts = f"{self.shape} {self.dtype.str} {info.CRC} {info.file_size}"
        self.key = hashlib.blake2b(b"".join([facts.encode(), *ends]), digest_size=16).hexdigest()

    def __str__(self) -> str:
        return f"{self.name} of {self.path}"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Some rows, a copy.

        Raises:
            DataError: the file is damaged there.
        """
        start, stop, _ = rows.indices(len(self))
        if self._map is not None:
            return np.array(self._map[start:stop])
        row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        try:
            if self._stream is None:
                self._archive = zipfile.ZipFile(self.path)
                self._stream = self._archive.open(f"{self.name}.npy")
            self._stream.seek(self._header + start * row)  # forward: what lies between is decompressed
            data = self._stream.read((stop - start) * row)
        except (*BROKEN, ValueError) as error:
            raise _damaged(self.path, error) from error
        if len(data) != (stop - start) * row:
            raise _damaged(self.path, EOFError(f"{self.name} ends early"))
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:]).copy()

    def _mapped(self, info: zipfile.ZipInfo) -> np.ndarray:
        with open(self.path, "rb") as handle:
            handle.seek(info.header_offset)
            local = handle.read(30)  # its own lengths of name and extra field, at 26 and 28
        inside = 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", info.header_offset + inside + self._header, self.shape)


def members(path: Path) -> list[str]:
    """Names of the arrays of an .npz file.

    Raises:
        DataError: it is no complete archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except BROKEN as error:
        raise _damaged(path, error) from error


def whole(path: Path, name: str) -> np.ndarray:
    """An array, read at once. Raises DataError as `Member` does."""
    member = Member(path, name)
    if not member.shape:
        raise DataError(f"{member} must be an array, got a single value")
    return member[:]


@dataclass(frozen=True)
class Parts:
    """An array that comes in parts, one after the other along its first axis."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    parts: Iterable[np.ndarray]


def comment(path: Path) -> bytes:
    """That of the archive; empty where there is none, or the file is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment
    except BROKEN:
        return b""


def write_npz(handle: BinaryIO, arrays: Mapping[str, np.ndarray | Parts], comment: bytes = b"") -> None:
    """As numpy.savez, with memory for one part of an array. No time stamps: equal arrays give equal files.

    Args:
        comment: of the archive, which readers of arrays pass over.
    """
    with zipfile.ZipFile(handle, "w") as archive:
        archive.comment = comment
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
            with archive.open(member, "w", force_zip64=True) as out:
                npy.write_array_header_1_0(out, header)
                for part in [array] if isinstance(array, np.ndarray) else array.parts:
                    out.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)


def _header(handle: Any, member: Member) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = npy.read_magic(handle)
        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"version {version}")
        # numpy would ask for as many bytes as the header says, up to 4 GB
        length = int.from_bytes(handle.read(2 if version == (1, 0) else 4), "little")
        if length > HEADER:
            raise ValueError(f"its header says that it has {length} bytes")
        handle.seek(npy.MAGIC_LEN)
        shape, fortran, dtype = readers[version](handle)
    except BROKEN:
        raise
    except Exception as error:  # the header is parsed as Python, and what that raises are a dozen classes
        raise DataError(f"{member} must be an array as numpy.save writes it: {error}") from error
    if dtype.hasobject:
        raise DataError(
            f"{member} must hold numbers, got Python objects, which only unpickling could read: refused, nothing of "
            "them was run"
        )
    return shape, fortran, dtype


def _damaged(path: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path} does not exist")
    reason = getattr(error, "strerror", None) or error
    return DataError(
        f"{path} must be a complete .npz file, but cannot be read to its end ({reason}): copy or write it again"
    )
