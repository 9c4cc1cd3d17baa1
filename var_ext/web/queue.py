"""The queue: requests wait in order, one thread draws them, and who leaves is no longer drawn for."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import torch

log = logging.getLogger(__name__)

Event = dict[str, Any]


class Full(Exception):
    """No more requests can wait."""


class Job:
    """One request.

    Args:
        work: starts it; a generator of its events, left between two of them when the job is cancelled.
        emit: is given each event, in order, from several threads but never two at once; None is the end.
    """

    def __init__(
        self, work: Callable[[], Generator[Event, None, None]], emit: Callable[[Event | None], None]
    ) -> None:
        self.work, self.emit = work, emit
        self.cancelled = threading.Event()


class DrawQueue:
    """Draws one job at a time, in the order in which they came.

    Args:
        capacity: how many may wait.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._open = True
        self.drawing: Job | None = None
        self._thread = threading.Thread(target=self._run, name="var_ext draws", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Appends a job, which is told its position.

        Raises:
            Full: as many wait as may, or the queue is closed.
        """
        with self._changed:
            if not self._open or len(self._waiting) >= self.capacity:
                raise Full
            self._waiting.append(job)
            job.emit({"event": "queued", "position": len(self._waiting) + (self.drawing is not None) - 1})
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Takes a job out if it waits; if it is being drawn, it ends after its next event."""
        with self._changed:
            job.cancelled.set()
            if job in self._waiting:
                self._waiting.remove(job)
                self._tell_positions()

    def close(self) -> None:
        """Cancels all jobs and ends the thread."""
        with self._changed:
            self._open = False
            for job in self._waiting:
                job.cancelled.set()
                job.emit(None)
            self._waiting.clear()
            if self.drawing:
                self.drawing.cancelled.set()
            self._changed.notify()
        self._thread.join(timeout=30)

    def _tell_positions(self) -> None:
        ahead = int(self.drawing is not None)
        for i, job in enumerate(self._waiting):
            job.emit({"event": "queued", "position": i + ahead})

    def _run(self) -> None:
        while True:
            with self._changed:
                self.drawing = None
                self._changed.wait_for(lambda: self._waiting or not self._open)
                if not self._open:
                    return
                job = self.drawing = self._waiting.popleft()
                self._tell_positions()
            self._draw(job)
            job.emit(None)
            del job  # its pictures are not kept while nothing is to do

    def _draw(self, job: Job) -> None:
        if job.cancelled.is_set():
            return
        try:
            work = job.work()
            try:
                for event in work:
                    if job.cancelled.is_set():
                        return
                    job.emit(event)
            finally:
                work.close()
        except (ValueError, torch.OutOfMemoryError) as error:
            job.emit({"event": "error", "message": str(error)})
        except Exception:  # one request must not end the thread that serves all
            log.exception("a request failed")
            job.emit({"event": "error", "message": "drawing failed: the server's log says why"})
