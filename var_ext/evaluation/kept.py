"""Results that are kept as JSON files with the settings they depend on, so that nothing is computed twice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from var_ext.checkpoints import CheckpointError, read_json, write_json


class Kept:
    """Results in a folder, NAME.json each: {"settings": ..., "result": ...}."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(
        self, name: str, settings: Mapping[str, Any], files: Sequence[str] = ()
    ) -> dict[str, Any] | None:
        """The result, or None: there is none, or a damaged one, or of other settings, or without one of its files."""
        try:
            found = read_json(self._path(name))
        except CheckpointError:
            return None
        result = found.get("result")
        fits = found.get("settings") == _plain(settings) and isinstance(result, dict)
        return result if fits and all((self.folder / file).is_file() for file in files) else None  # type: ignore[return-value]

    def write(self, name: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps a result, of JSON values, and returns it as it will be read. Raises CheckpointError."""
        write_json(self._path(name), {"settings": _plain(settings), "result": dict(result)})
        return _plain(result)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(value))
