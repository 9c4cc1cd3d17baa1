"""What signals and the clock ask of a run: a checkpoint now, or a checkpoint and the end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from var_ext.training.ranks import Ranks

STOPPED = 75  # exit status of a run that SIGTERM ended: EX_TEMPFAIL, "try again later"
AGAIN = 5.0  # seconds until a program that goes on after its time is asked once more to end


class Interrupts:
    """SIGUSR1 and a clock ask for a checkpoint, SIGTERM for a checkpoint and the end.

    A context in which the two signals are caught; in a thread other than the main one they keep their effect.

    Args:
        ranks: they agree, also where only one of them got a signal; the clock is that of rank 0.
        minutes: between two checkpoints, 0 for no clock.
    """

    def __init__(self, ranks: Ranks, minutes: float) -> None:
        self.ranks, self.seconds = ranks, 60 * minutes
        self.save = self.stop = False
        self.saved()

    def __enter__(self) -> Interrupts:
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self.before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self.stop = True
        else:
            self.save = True

    def asked(self, failed: bool = False) -> tuple[bool, bool, bool]:
        """(whether to save, whether to stop) after the next step, and whether a rank has `failed`.

        Ranks call this together before each step.
        """
        due = bool(self.seconds) and self.ranks.rank == 0 and time.monotonic() - self.last >= self.seconds
        save, self.save = self.save, False
        save, stop, failed = self.ranks.any(save or due, self.stop, failed)
        return save or stop, stop, failed

    def saved(self) -> None:
        """A checkpoint was written: the clock starts again."""
        self.last = time.monotonic()


@contextmanager
def limited(minutes: float) -> Iterator[None]:
    """After so many minutes the program is asked to end; 0 is never. For programs of several trainings.

    A training inside the block writes a checkpoint first; what else runs there is left by SystemExit, with the same
    status.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(STOPPED)

    if not minutes:
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    over = threading.Event()

    def ask() -> None:  # and again: an exception that falls into a destructor is lost
        pause = 60 * minutes
        while not over.wait(pause):
            os.kill(os.getpid(), signal.SIGTERM)
            pause = AGAIN

    clock = threading.Thread(target=ask, daemon=True)
    clock.start()
    try:
        yield
    finally:
        over.set()
        clock.join()
        signal.signal(signal.SIGTERM, before)
