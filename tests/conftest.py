"""Fixtures of all tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch

from var_ext import _C, backend

pytest.register_assert_rewrite("tests.ops.oracle", "tests.ops.interpolation")


@pytest.fixture(params=backend.CHOICES)
def either_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on both backends, whatever VAR_EXT_BACKEND says."""
    with backend.force(request.param):
        yield request.param


_cache = tempfile.TemporaryDirectory()  # indexes of folders: not among the user's, and gone at the end


def pytest_configure() -> None:
    os.environ["VAR_EXT_CACHE"] = _cache.name
    torch.set_num_threads(1)  # the tensors of tests are small: more threads would only wait for each other


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=_C.cpu_info()["isa"])
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native backend on each variant of the CPU kernels that this processor runs."""
    before = _C.isa()
    _C.set_isa(request.param)
    with backend.force("native"):
        yield request.param
    _C.set_isa(before)
