"""Memory for the keys and values of one sampling run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

LARGEST_KEPT = 2**27  # bytes kept between runs; the decoder needs the rest


class Cache:
    """Keys and values of all blocks in one block of memory.

    On the CPU the last run's block is reused unless another run holds it: fresh memory costs page faults.
    """

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    @contextmanager
    def of(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
        """Uninitialised memory of this shape for the duration of a run."""
        kept, self._kept = self._kept, None
        if kept is None or kept.shape != shape or kept.dtype != dtype or kept.device != device:
            kept = None  # free the old block before allocating the new one
            with torch.inference_mode(False):
                kept = torch.empty(shape, dtype=dtype, device=device)
        yield kept
        if kept.device.type == "cpu" and kept.nbytes <= LARGEST_KEPT:
            self._kept = kept
