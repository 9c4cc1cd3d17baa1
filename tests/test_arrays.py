"""A .npy file whose header lies, or has a flipped bit, is taken for broken and nothing else."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from var_ext.arrays import map_array
from var_ext.checkpoints import CheckpointError
from var_ext.data import DataError
from var_ext.evaluation.npz import Member
from var_ext.export.destinations import _holds
from var_ext.training.tokens import Shards

ROWS = np.arange(24, dtype=np.int16).reshape(2, 3, 4)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def flipped(bit: int) -> bytes:
    data = bytearray(npy(ROWS))
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def through_shards(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    Shards([path])


def through_an_export(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    _holds(path, ROWS.shape, np.uint8)


def through_an_archive(data: bytes, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", data)
    Member(path, "x")


USES = [through_shards, through_an_export, through_an_archive]


def test_arrays_are_mapped(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(npy(ROWS))
    found = map_array(tmp_path / "x.npy")
    assert np.array_equal(found, ROWS) and not found.flags.writeable


@pytest.mark.parametrize("use", USES)
def test_every_flipped_bit_of_a_header(use: Callable[[bytes, Path], None], tmp_path: Path) -> None:
    refused = 0
    for bit in range(1024):
        try:
            use(flipped(bit), tmp_path / "x.npy")
        except (CheckpointError, DataError):
            refused += 1
    assert refused > 256 or use is through_an_export


HEADERS = {
    "4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{'descr'",
    "deep": b"\x93NUMPY\x01\x00" + (8000).to_bytes(2, "little") + b"(" * 8000,
    "empty": b"",
    "cut": b"\x93NUMPY\x01",
    "an archive": b"PK\x03\x04",
    "objects": npy(np.zeros(3)).replace(b"'<f8'", b"'|O' ")[:200],
    "huge shape": npy(np.zeros(3)).replace(b"(3,), }  ", b"(10**9,)}"),
    "negative shape": npy(np.zeros(3)).replace(b"(3,)", b"(-3)"),
    "version 9": b"\x93NUMPY\x09\x00" + bytes(200),
}


@pytest.mark.parametrize("use", [through_shards, through_an_archive])
def test_a_long_header_is_not_read(use: Callable[[bytes, Path], None], tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, DataError), match="says that it has 4294967295 bytes"):
        use(HEADERS["4 GB"], tmp_path / "x.npy")


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("use", USES)
def test_headers_that_lie(use: Callable[[bytes, Path], None], header: bytes, tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, DataError)):
        use(header, tmp_path / "x.npy")
        assert use is through_an_export
        raise DataError("taken for missing")
