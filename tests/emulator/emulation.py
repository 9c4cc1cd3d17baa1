"""Builds the emulated kernels and calls them as the extension's would be called."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from tests.build.tools import ROOT, SEARCH, tool
from var_ext import _C

BUILD = ROOT / "build" / "emulated"


def build(folder: Path = BUILD, sources: Path = ROOT / "csrc") -> Path:
    """Compile the kernels of `sources` for the emulator, as far as they changed, and return the module's file."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        return _build(folder, sources)


def _build(folder: Path, sources: Path) -> Path:
    import pybind11

    environment = {**os.environ, "PATH": SEARCH}
    configure = [
        tool("cmake"), "-S", str(ROOT / "tests/emulator"), "-B", str(folder), "-G", "Ninja", f"-DSOURCES={sources}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    for command in (configure, [tool("ninja"), "-C", str(folder)]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    (module,) = folder.glob("_emulated*.so")
    return module


def load(file: Path) -> Any:
    """The module in `file`: the machine's knobs, and `CudaStream`."""
    spec = importlib.util.spec_from_file_location("_emulated", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def emulator() -> Any:
    """The emulator with this repository's kernels, or with those of the module that VAR_EXT_EMULATED names."""
    given = os.environ.get("VAR_EXT_EMULATED")
    return load(Path(given) if given else build())


class Stream:
    """Stands for `_C.CudaStream`: tells the machine which memory belongs to a call, and launches."""

    called: ClassVar[set[str]] = set()  # kernels so far

    def __getattr__(self, kernel: str) -> Callable[..., None]:
        launch = getattr(emulator().CudaStream(0, 0), kernel)

        def call(*given: Any, **named: Any) -> None:
            views = [v for v in (*given, *named.values()) if isinstance(v, _C.TensorView)]
            self.called.add(kernel)
            emulator().begin(kernel, [extent(view) for view in views])
            launch(*given, **named)

        return call


def extent(view: _C.TensorView) -> tuple[int, int]:
    """Address and length in bytes of the memory that a view spans."""
    if 0 in view.shape:
        return view.ptr, 0
    size = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int64": 8, "uint8": 1}[view.dtype.name]
    last = sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
    return view.ptr, (last + 1) * size
