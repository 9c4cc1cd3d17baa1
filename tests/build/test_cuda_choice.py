"""VAR_EXT_CUDA: what CMake decides and says. The cases here have no CUDA toolkit; .ci/run builds with one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pybind11
import pytest

from tests.build.tools import ROOT, tool

Configure = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Configure:
    """Runs the CMake configure step; the folder is shared, so the compiler is looked at once."""
    build = tmp_path_factory.mktemp("cmake")

    def run(choice: str, cuda_home: Path, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "VAR_EXT_CUDA")}
        command = [
            tool("cmake"),
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DVAR_EXT_CUDA={choice}",
        ]
        command += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-DSKBUILD_PROJECT_VERSION=0.0.1"]
        command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        return subprocess.run(
            command,
            env={**environment, "CUDA_HOME": str(cuda_home), **settings},
            capture_output=True,
            text=True,
        )

    return run


def words(text: str) -> str:
    """CMake wraps messages: one line of single spaces."""
    return " ".join(text.split())


def broken_nvcc(folder: Path) -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho unsupported host compiler >&2\nexit 1\n")
    nvcc.chmod(0o755)
    return folder


def test_auto_without_nvcc_builds_for_the_cpu_and_says_so(configure: Configure, tmp_path: Path) -> None:
    result = configure("AUTO", tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"VAR_EXT_CUDA=AUTO: CPU only, no nvcc in CUDA_HOME ({tmp_path})" in result.stdout


def test_empty_settings_are_as_none(configure: Configure, tmp_path: Path) -> None:
    result = configure("", tmp_path, CUDACXX="")
    assert result.returncode == 0, result.stderr
    assert f"VAR_EXT_CUDA=AUTO: CPU only, no nvcc in CUDA_HOME ({tmp_path})" in result.stdout


def test_on_without_nvcc_fails_with_the_remedy(configure: Configure, tmp_path: Path) -> None:
    result = configure("ON", tmp_path)
    assert result.returncode != 0
    message = words(result.stderr)
    assert f"VAR_EXT_CUDA=ON, but no nvcc in CUDA_HOME ({tmp_path})" in message
    assert "Install the CUDA toolkit" in message
    assert "VAR_EXT_CUDA=OFF" in message


def test_auto_with_a_broken_nvcc_builds_for_the_cpu(configure: Configure, tmp_path: Path) -> None:
    result = configure("AUTO", broken_nvcc(tmp_path))
    assert result.returncode == 0, result.stderr
    assert f"VAR_EXT_CUDA=AUTO: CPU only, {tmp_path}/bin/nvcc cannot compile" in result.stdout
    assert "unsupported host compiler" in result.stdout


def test_on_with_a_broken_nvcc_fails(configure: Configure, tmp_path: Path) -> None:
    result = configure("ON", broken_nvcc(tmp_path))
    assert result.returncode != 0
    assert "nvcc cannot compile for sm_90a (1: unsupported host compiler)" in words(result.stderr)


def test_off_says_so(configure: Configure, tmp_path: Path) -> None:
    result = configure("OFF", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "VAR_EXT_CUDA=OFF: CPU only" in result.stdout


def test_anything_else_is_refused(configure: Configure, tmp_path: Path) -> None:
    result = configure("MAYBE", tmp_path)
    assert result.returncode != 0
    assert "VAR_EXT_CUDA must be AUTO, ON or OFF, got 'MAYBE'" in words(result.stderr)
