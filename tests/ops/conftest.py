"""Memory that an op asks for begins as NaN, integers as their largest value: an element left unwritten shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch fills what `torch.empty` and its kin return, in its deterministic mode."""
    if "beyond_32_bits" in request.node.name:  # tensors of gigabytes, of which a test touches the ends alone
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
