"""Picture files that Pillow does not write: PNGs and EXIF byte by byte."""

from __future__ import annotations

import struct
import zlib

import numpy as np

PNG_START = b"\x89PNG\r\n\x1a\n"


def chunk(name: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(pixels: np.ndarray, early: bytes = b"", late: bytes = b"", *, kind: int = 0) -> bytes:
    """Pixels (H, W) or (H, W, C) of 8 or 16 bits, of a kind as IHDR counts them, between other chunks."""
    height, width = pixels.shape[:2]
    depth = 8 * pixels.itemsize
    rows = b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + early + chunk(b"IDAT", zlib.compress(rows)) + late
    return PNG_START + body + chunk(b"IEND")


def exif(turn: int, *, tag: int = 0x011A, numerator: int = 1, denominator: int = 1) -> bytes:
    """A turn, and a signed rational under a tag (0x011A: horizontal resolution)."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, turn, 0) + struct.pack("<HHII", tag, 10, 1, 38)
    ifd = struct.pack("<H", 2) + entries + struct.pack("<I", 0)
    return b"Exif\0\0" + struct.pack("<2sHI", b"II", 42, 8) + ifd + struct.pack("<ii", numerator, denominator)
