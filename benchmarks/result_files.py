"""Result files that are complete at any moment: a run may be stopped between two figures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def save(path: Path, report: Mapping[str, Any]) -> None:
    """Replaces the file with JSON atomically: a reader finds the previous report or this one, never half of one."""
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):  # as /dev/null
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote there, or nothing."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
