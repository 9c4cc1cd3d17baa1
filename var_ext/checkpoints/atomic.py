"""Files that are either complete or not there: atomic writes, and JSON."""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from var_ext.paths import user_path


class CheckpointError(RuntimeError):
    """A file cannot be read, written, fetched or used; the message says which and why."""


def first_line(error: BaseException) -> str:
    """A library's error message, without the advice that follows."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yields a binary handle whose content appears under `path` all at once when the block ends well.

    The bytes go to a hidden file in the same folder, reach the disk, and only then take the name. Whatever
    fails (the block itself, a full disk, a folder without permission), an older file at `path` is left
    unchanged and the hidden file is removed. Missing folders are created. Links are followed and kept.

    Raises:
        CheckpointError: the file could not be written; names the path and the system's reason.
    """
    path = user_path(path)
    target = Path(os.path.realpath(path))
    # The rename would put a plain file in place of a pipe or a device.
    if os.path.exists(target) and not os.path.isfile(target):
        kind = "a folder" if os.path.isdir(target) else "no regular file"
        raise CheckpointError(f"could not write {path}: it must be a file or not be there yet, and is {kind}")
    # One name per writer: two processes that save to one path must not write to the same file.
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        if target.parent.exists() and not target.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))  # mkdir says "exists"
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as handle:
            if target.is_file():  # what was private stays so
                os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
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


def clear_remains(folder: Path, pattern: str = "*") -> None:
    """Removes the temporary files that killed writers left for such names: none must be alive, unless it would write
    what is there already."""
    for remains in folder.glob(f".{pattern}.*.tmp"):
        with suppress(OSError):
            remains.unlink()


class _Withdrawn(Exception):
    """Ends the block of `check_writable` before the file takes its name."""


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises the CheckpointError of writing to `path`, before starting the work whose result goes there."""
    with suppress(_Withdrawn), atomic_write(path):
        raise _Withdrawn


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, if the system allows opening a folder."""
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


def listed(folder: Path) -> list[str]:
    """Names of the files in a folder, in order. Raises CheckpointError if it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"could not read {folder}: {error.strerror or error}") from error


def read_json(path: str | os.PathLike[str]) -> dict[str, object]:
    """Reads a JSON object.

    Raises:
        CheckpointError: the file is missing, is not JSON, or is not an object.
    """
    try:
        value = json.loads(user_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error
    # broken JSON, bytes that are not text, lists in lists in lists
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be a JSON object, but: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(value).__name__}")
    return value
