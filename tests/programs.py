"""Programs of python/, as modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

PYTHON = Path(__file__).resolve().parents[1] / "python"


@contextmanager
def program_at(place: str) -> Iterator[ModuleType]:
    """The module of a program, such as "train_digits.py", while the block runs; its neighbours are found as they are
    when it is started, and forgotten afterwards: other folders have files of the same names."""
    path, before = PYTHON / place, set(sys.modules)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        patch.setitem(sys.modules, path.stem, module)  # where dataclasses look for it
        spec.loader.exec_module(module)
        yield module
    neighbours = {other.stem for other in path.parent.glob("*.py")}
    for name in neighbours & (set(sys.modules) - before):
        del sys.modules[name]
