"""Programs that the tests of the build run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def tool(*names: str) -> str:
    """The first of `names` that this environment has; its folder comes before PATH."""
    for name in names:
        if found := shutil.which(name, path=SEARCH):
            return found
    raise AssertionError(f"the tests of the build need {' or '.join(names)}: pip install -e .[dev]")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
