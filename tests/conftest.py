"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from var_ext import backend


@pytest.fixture(params=backend.CHOICES)
def either_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on both backends, whatever VAR_EXT_BACKEND says."""
    with backend.force(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
