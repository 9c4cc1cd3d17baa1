"""CONTRIBUTING.md's recipe for an op, followed to the letter, on a copy of the project that has no other op."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

from tests.build.tools import ROOT, tool
from var_ext import __version__, ops

OP = "squared_relu"
BLOCK = re.compile(r"^`([\w./]+)`\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LISTED = re.compile(r"to `([\w./]+)`\n\n```cpp\n(.*)\n(.*)\n```")
RUN = """
import sys
sys.path[:0] = sys.argv[1:3]  # without the site's own paths, on which an editable var_ext would come first
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[3:]]))
"""


def copy_without_ops(to: Path) -> None:
    """The project, but no source of a kernel: what is left must need no op."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "weights", "golden")
    for folder in ("var_ext", "tests", "csrc"):
        shutil.copytree(ROOT / folder, to / folder, ignore=ignored)
    for file in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / file, to / file)
    own = [
        path
        for folder in ("ops", "cpu", "cuda")
        for path in (to / "csrc" / folder).iterdir()
        if path.name.startswith(tuple(ops.__all__)) or path.suffix in (".cpp", ".cu")
    ]
    for path in own:
        if path.name not in ("bindings.cpp", "devices.cu"):
            path.unlink()


def follow(page: str, to: Path) -> list[str]:
    """Do what the page says; the files that it made."""
    files = dict(BLOCK.findall(page))
    for name, text in files.items():
        assert not (to / name).exists(), name
        (to / name).write_text(text, encoding="utf-8")
    ((name, include, kernel),) = LISTED.findall(page)
    kernels = (to / name).read_text(encoding="utf-8")
    kernels = re.sub(r'^#include "ops/.*\n', "", kernels, flags=re.MULTILINE)
    kernels, _ = re.split(r"(?<=VAR_EXT_KERNELS\(KERNEL, CPU_KERNEL, FUNCTION\))", kernels)
    (to / name).write_text(f"{include}\n{kernels} \\\n{kernel}\n", encoding="utf-8")
    for room in ("ops", "reference"):
        (line,) = re.findall(rf"^from var_ext\.{room}\.{OP} import {OP}$", page, re.MULTILINE)
        face = to / "var_ext" / room / "__init__.py"
        text = face.read_text(encoding="utf-8").replace("__all__ = [", f'{line}\n\n__all__ = [\n    "{OP}",')
        face.write_text(text, encoding="utf-8")
    return list(files)


def build(project: Path) -> None:
    configure = [
        tool("cmake"), "-S", project, "-B", project / "build", "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DSKBUILD_PROJECT_VERSION={__version__}",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-DVAR_EXT_CUDA=OFF",
    ]  # fmt: skip
    for command in (configure, [tool("cmake"), "--build", project / "build"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (module,) = (project / "build").glob("_C*.so")
    shutil.copy(module, project / "var_ext")


@pytest.mark.slow  # a minute of compiling, the emulator's machine too
def test_the_recipe_makes_an_op(tmp_path: Path) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    copy_without_ops(tmp_path)
    files = follow(page, tmp_path)
    assert len(files) == 10  # the benchmark is the eleventh
    build(tmp_path)
    tests = [name for name in files if name.startswith("tests/")]
    packages = sysconfig.get_path("purelib")
    done = subprocess.run(
        [sys.executable, "-S", "-c", RUN, tmp_path, packages, *tests],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert re.search(r"^\d+ passed in", done.stdout, re.MULTILINE)


def test_the_recipe_counts_right() -> None:
    """Its own files are those that an op has: none forgotten, none that the others do without."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    places = {name.replace(OP, "bias_residual") for name, _ in BLOCK.findall(page)}
    places.add("benchmarks/bench_bias_residual.py")
    sources = [
        path for folder in ("csrc", "var_ext", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.*")
    ]
    there = {
        str(path.relative_to(ROOT))
        for path in sources
        if re.fullmatch(r"\w*bias_residual\w*\.(?!pyc)\w+", path.name)
    }
    assert places == there
    assert len(places) == 11
