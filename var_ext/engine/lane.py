"""Where sampling runs on a GPU: one stream per device, one thread at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock

import torch
from torch import Tensor


class Lane:
    """A stream for warm-up, capture and replay on one device, and the lock that goes with it.

    The stream is kept, because cuBLAS keeps a workspace for each stream it has used.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._lock = device, RLock()
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def taken(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Makes device and stream current, ordered after the caller's earlier work and before its later work.

        Yields a function that copies a result for the caller. On other devices it only takes the lock.
        """
        with self._lock:
            if self.device.type != "cuda":
                yield _copy
                return
            with torch.cuda.device(self.device):
                self._stream = self._stream or torch.cuda.Stream()
                callers = torch.cuda.current_stream()
                self._stream.wait_stream(callers)

                def copied(result: Tensor) -> Tensor:
                    copy = _copy(result)
                    copy.record_stream(callers)  # memory is reused only after the caller's use of it
                    return copy

                try:
                    with torch.cuda.stream(self._stream):
                        yield copied
                finally:
                    callers.wait_stream(self._stream)


def _copy(result: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # an ordinary tensor, usable outside inference mode
        return result.clone()


_lanes: dict[torch.device, Lane] = {}


def lane_of(device: torch.device) -> Lane:
    """The one lane of a device."""
    return _lanes.setdefault(device, Lane(device))
