"""Clocks of a CPU and of a GPU, and the one way in which competitors are timed: in turns, lap after lap."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from var_ext.engine.memory import out_of_memory

Call = Callable[[], Any]


class Clock:
    """The CPU's.

    device: of the tensors; cache: bytes that inputs must exceed, or they would be read from it; lap: seconds of work
    after which a reading is steady; singly: whether each call of a lap is timed, or their sum; brief: whether a lap
    of one call will do.
    """

    cache, lap, singly, brief = 0, 0.1, True, False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """A moment."""
        return time.perf_counter()

    def between(self, begin: Any, end: Any) -> float:
        """Seconds between two moments."""
        return end - begin

    def wait(self) -> None:
        """Waits for all work; raises its errors."""

    def stream(self) -> Any:
        """The context in which ops are timed."""
        return nullcontext()

    def capture(self, calls: list[Call]) -> Call | None:
        """A replay of the calls without Python in between; None where there is no such thing."""
        return None

    def release(self) -> None:
        """Frees unused memory."""
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # earlier compiled shapes count towards a limit
        gc.collect()

    def seconds(self, call: Call) -> float:
        """Of one call."""
        begin = self.mark()
        call()
        end = self.mark()
        self.wait()
        return self.between(begin, end)


class Rehearsal(Clock):
    """The smoke run's: its readings mean nothing, but all lines run that a GPU needs."""

    singly, brief = False, True

    def capture(self, calls: list[Call]) -> Call:
        return lambda: [call() for call in calls]


class Cuda(Clock):
    """A GPU's: events in its stream, so that nothing waits between calls."""

    lap, singly = 4e-3, False

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._own = torch.cuda.Stream(device)

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def stream(self) -> Any:
        """One of its own: kernels on any other would show as errors."""
        return torch.cuda.stream(self._own)

    def capture(self, calls: list[Call]) -> Call:
        """A CUDA graph; raises where a call waits for the GPU."""
        # found here, since a failed capture breaks later ones
        torch.cuda.set_sync_debug_mode("error")
        try:
            for call in calls:
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        self.wait()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()  # on the timing stream; `torch.cuda.graph` would empty the allocator each time
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
        return graph.replay

    def release(self) -> None:
        self.wait()
        super().release()
        torch.cuda.empty_cache()


def clock_of(device: torch.device) -> Clock:
    return (Cuda if device.type == "cuda" else Clock)(device)


class Watch:
    """Marks the ends of the parts of a run: on a GPU by events in its stream, without a sync."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.marks: list[tuple[str, Any]] = [("", clock.mark())]

    def __call__(self, part: str) -> None:
        """`part` ends here; it began at the previous mark."""
        self.marks.append((part, self.clock.mark()))

    def parts(self) -> dict[str, list[float]]:
        """Seconds of each part, one value per mark."""
        self.clock.wait()
        seconds: dict[str, list[float]] = {}
        for (_, begin), (part, end) in zip(self.marks, self.marks[1:], strict=False):
            seconds.setdefault(part, []).append(self.clock.between(begin, end))
        return seconds


@dataclass
class Timed:
    """Laps of one competitor: seconds of each, its parts, or the reason why there are none."""

    seconds: list[float] = field(default_factory=list)
    laps: list[dict[str, list[float]]] = field(default_factory=list)
    error: str | None = None

    def parts(self) -> dict[str, list[float]]:
        """The median over laps of each part, place by place."""
        return {
            part: [median(column) for column in zip(*(lap[part] for lap in self.laps), strict=True)]
            for part in (self.laps[0] if self.laps else ())
        }

    def as_dict(self) -> dict[str, Any]:
        return dict(seconds=self.seconds, parts=self.parts(), error=self.error)


def in_turn(
    competitors: Mapping[str, Callable[[Watch], Any]], laps: int, clock: Clock, *, warm: bool = False
) -> dict[str, Timed]:
    """All in turn, lap after lap; each lap begins with the next one. One that runs out of memory is dropped.

    Args:
        competitors: name -> a call that may mark its parts.
        warm: whether all are warm already; else each runs once before.
    """
    results = {name: Timed() for name in competitors}
    names = list(competitors)
    for lap in range(0 if warm else -1, laps):
        first = max(lap, 0) % max(1, len(names))
        for name in names[first:] + names[:first]:
            timed = results[name]
            if timed.error:
                continue
            collecting = gc.isenabled()
            gc.disable()  # a pause at random; and a capture must not free another graph
            try:
                clock.wait()
                begin, watch = time.perf_counter(), Watch(clock)
                competitors[name](watch)
                clock.wait()
                seconds, parts = time.perf_counter() - begin, watch.parts()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                timed.error = "out of memory"
                clock.release()
                continue
            finally:
                if collecting:
                    gc.enable()
            if lap >= 0:
                timed.seconds.append(seconds)
                timed.laps.append(parts)
    return results
