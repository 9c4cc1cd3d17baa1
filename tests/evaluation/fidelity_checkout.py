"""torch-fidelity's own code, for tests beside it: VAR_EXT_TORCH_FIDELITY names a checkout of
github.com/toshas/torch-fidelity."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any
from unittest.mock import MagicMock

import pytest

FOLDER = os.environ.get("VAR_EXT_TORCH_FIDELITY", "")
MISSING = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)

with_torch_fidelity = pytest.mark.skipif(
    not FOLDER, reason="VAR_EXT_TORCH_FIDELITY names no checkout of torch-fidelity"
)


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of it. torchvision, which it imports and figures do not use, is a stand-in."""
    monkeypatch.setattr(sys, "path", [*sys.path, FOLDER])
    for missing in MISSING:
        monkeypatch.setitem(sys.modules, missing, MagicMock())
    return importlib.import_module(f"torch_fidelity.{name}")
