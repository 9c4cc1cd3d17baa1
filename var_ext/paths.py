"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path with a leading ~ or ~user as the home folder; write ./~ for a folder of that name."""
    return Path(os.path.expanduser(path))


def is_file_name(value: object) -> bool:
    """Whether this is the name of a file in a folder, and leads nowhere else."""
    return isinstance(value, str) and value not in ("", ".", "..") and not set("/\\\0") & set(value)
