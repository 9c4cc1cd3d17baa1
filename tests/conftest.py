"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from var_ext import backend

pytest.register_assert_rewrite("tests.ops.oracle", "tests.ops.interpolation")


@pytest.fixture(params=backend.CHOICES)
def either_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on both backends, whatever VAR_EXT_BACKEND says."""
    with backend.force(request.param):
        yield request.param


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the tensors of tests are small: more threads would only wait for each other


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
