"""Arrays in .npy files, as numpy.save writes them: mapped, so that a header which lies costs nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.lib import format as npy

HEADER = 10_000  # bytes; numpy's own have some 128


def map_array(path: Path) -> np.ndarray:
    """A .npy file as a read-only map of any shape. numpy.load would read a header of 4 GB if the file says so, and
    raises a dozen classes for damaged ones.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no complete .npy file of numbers.
    """
    with open(path, "rb") as handle:
        start = handle.read(12)
    if start[:6] != npy.MAGIC_PREFIX or len(start) < 12:
        raise ValueError("it is no .npy file")
    version, length = tuple(start[6:8]), int.from_bytes(start[8 : 10 if start[6] == 1 else 12], "little")
    if version not in ((1, 0), (2, 0), (3, 0)) or length > HEADER:
        raise ValueError(f"its header of version {version} says that it has {length} bytes: it is damaged")
    try:
        return np.asarray(npy.open_memmap(path, mode="r"))  # a memmap of its own for each row would cost more
    except OSError:
        raise
    # the header is parsed as Python: from SyntaxError and TokenError to RecursionError
    except Exception as error:
        raise ValueError(f"its header or size is damaged ({type(error).__name__})") from error
