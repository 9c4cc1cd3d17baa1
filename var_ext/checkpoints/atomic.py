"""Files that are either complete or not there: atomic writes, and tensors in the safetensors format."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

# Largest element first keeps every tensor aligned to its own size, as the safetensors library lays files out.
_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


class CheckpointError(RuntimeError):
    """A file cannot be read, written, fetched or used; the message says which and why."""


def first_line(error: Exception) -> str:
    """What a library's error says, without the advice that follows."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yields a binary handle whose content appears under `path` all at once when the block ends well.

    The bytes go to a hidden file in the same folder, reach the disk, and only then take the name. Whatever
    fails (the block itself, a full disk, a folder without permission), an older file at `path` stays as it
    was and the hidden file is removed. Missing folders are made. A link is followed and stays.

    Raises:
        CheckpointError: the file could not be written; names the path and the system's reason.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    # The rename would put a plain file in place of a pipe or a device.
    if os.path.exists(target) and not os.path.isfile(target):
        kind = "a folder" if os.path.isdir(target) else "no regular file"
        raise CheckpointError(f"could not write {path}: it must be a file or not be there yet, and is {kind}")
    # A name of its own for each writer: two processes that save to one path must not write into one file.
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        if target.parent.exists() and not target.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))  # mkdir says "exists"
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        kept = "; the file that was there is unchanged" if os.path.isfile(target) else ""
        raise CheckpointError(f"could not write {path}: {error.strerror or error}{kept}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


class _Withdrawn(Exception):
    """Ends the block of `check_writable` before the file takes its name."""


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises the CheckpointError of writing to `path` before the work whose result is to go there."""
    with suppress(_Withdrawn), atomic_write(path):
        raise _Withdrawn


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut, where the system allows opening a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Writes `value` as indented JSON, atomically. Raises CheckpointError as `atomic_write` does."""
    with atomic_write(path) as handle:
        handle.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: str | os.PathLike[str]) -> dict[str, object]:
    """Reads a JSON object.

    Raises:
        CheckpointError: the file is missing, is not JSON, or is not an object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error
    except ValueError as error:  # broken JSON, or bytes that are no text at all
        raise CheckpointError(f"{path} must be a JSON object, but: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(value).__name__}")
    return value


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes named tensors as one safetensors file, atomically and without a second copy of them in memory.

    The safetensors library writes either to a path of its own choice or to a byte string as large as the
    model; the format is a header and the raw data, so it is written here through `atomic_write` instead.

    Args:
        path: the file to write.
        tensors: name -> tensor of any shape, device and strides.
        metadata: text to keep in the header.

    Raises:
        CheckpointError: the file could not be written.
        TypeError: a tensor's dtype has no place in the format.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise TypeError(f"{name} must have one of the dtypes {known} to be saved, got {tensor.dtype}")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts aligned
    with atomic_write(path) as handle:
        handle.write(len(encoded).to_bytes(8, "little"))
        handle.write(encoded)
        for name in order:
            # numpy has no bfloat16, so every dtype goes through its bytes
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            if flat.numel():
                handle.write(flat.view(torch.uint8).numpy().data)


def load_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Reads a safetensors file into CPU tensors.

    Raises:
        CheckpointError: the file is missing, cut short, or of another format; says which file and what it
            holds.
    """
    file = Path(path)
    try:
        with safe_open(file, framework="pt") as reader:
            names = reader.keys()
            return {name: reader.get_tensor(name) for name in names}
    except OSError as error:
        raise CheckpointError(f"could not read {file}: {error.strerror or error}") from error
    except SafetensorError as error:
        size = file.stat().st_size
        raise CheckpointError(
            f"{file} must be a complete safetensors file, but its {size} bytes are cut short or of "
            f"another format ({error}); copy or download it again"
        ) from error
