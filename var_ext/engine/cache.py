"""Memory for the keys and values of a sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

LARGEST_KEPT = 2**27  # bytes that stay between samplings; more would be missed in decoding


class Cache:
    """Keys and values of all blocks in one block of memory.

    On the CPU that of the last sampling serves again, if no other has it now: fresh memory costs a fault a page.
    """

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    @contextmanager
    def of(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
        """Memory of this shape for the time of a sampling, not filled."""
        kept, self._kept = self._kept, None
        if kept is None or kept.shape != shape or kept.dtype != dtype or kept.device != device:
            kept = None  # the old goes before the new comes
            with torch.inference_mode(False):
                kept = torch.empty(shape, dtype=dtype, device=device)
        yield kept
        if kept.device.type == "cpu" and kept.nbytes <= LARGEST_KEPT:
            self._kept = kept
