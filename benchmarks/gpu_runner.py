"""Runs the steps of the hardware command within a budget, in parallel where nothing is timed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.report import ROOT, load

SHOWN, OF_FAILURE = (
    3000,
    20_000,
)  # characters of a step's final output kept in the report; a file has all of it
Result = dict[str, Any]


class Budget:
    """Seconds for everything.

    Args:
        seconds: until all should be done.
        shared: whether a step is limited to its own share; not so without a GPU, where two cores may be all there is.
    """

    def __init__(
        self, seconds: float, *, shared: bool = True, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds, self.shared, self._now = seconds, shared, now
        self._begin = now()

    def spent(self) -> float:
        return self._now() - self._begin

    def of(self, share: float) -> float:
        """Seconds for a step with this share, at most what earlier steps left."""
        left = max(5.0, self.seconds - self.spent())
        return min(share, left) if self.shared else left


def nothing(step: Result, text: str) -> Result:
    return {}


@dataclass(frozen=True)
class Step:
    """A program of the report.

    seconds: its share of the budget; figures: the JSON that it writes as it goes, part of the report; read: what its
    result, output or other files add to the report.
    """

    command: Sequence[object]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    figures: Path | None = None
    read: Callable[[Result, str], Result] = nothing


class _Running:
    """A started program, its output in a file that outlives it."""

    def __init__(self, step: Step, seconds: float, log: Path) -> None:
        self.step, self.seconds, self.log = step, seconds, log
        self._seen: Result = {}
        if step.figures:
            step.figures.unlink(missing_ok=True)
        # `make` pins versions for another environment
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
        self.begin = time.monotonic()
        with log.open("wb") as output:
            self.child = subprocess.Popen(
                [str(word) for word in step.command], cwd=ROOT, env={**inherited, **step.environment},
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def figures(self) -> Result:
        """Its output so far."""
        return load(self.step.figures) if self.step.figures else {}

    def news(self) -> Result | None:
        """Its entry in the report while it runs, if there is news."""
        now = self.figures()
        if not now or now == self._seen:
            return None
        self._seen = now
        return dict(ok=False, status="under way", seconds=round(time.monotonic() - self.begin, 1), **now)

    def kill(self) -> None:
        """Stops it with its children, which would keep the GPU."""
        with suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()

    def result(self) -> Result | None:
        """None while it runs and has time left."""
        status = self.child.poll()
        took = time.monotonic() - self.begin
        if status is None and took < self.seconds:
            return None
        self.kill()
        text = self.log.read_text(encoding="utf-8", errors="replace")
        said = f"stopped after {self.seconds:.0f} s" if status is None else str(status)
        step = dict(ok=status == 0, status=said, seconds=round(took, 1))
        try:
            step |= self.figures()
            step |= self.step.read(step, text)
        except Exception as error:  # an incomplete file: the other steps still count
            step |= dict(ok=False, status=f"{said}, and what it left cannot be read: {error!r}"[:300])
        return {**step, "end": text[-SHOWN if step["ok"] else -OF_FAILURE :]}


def together(
    steps: Mapping[str, Step], budget: Budget, logs: Path, keep: Callable[[str, Result], None]
) -> dict[str, Result]:
    """Runs steps in parallel; saves each as it ends, and partial results every second.

    A step over its time is stopped with its children and the others go on; none outlives this call.
    """
    logs.mkdir(parents=True, exist_ok=True)
    running: dict[str, _Running] = {}
    results: dict[str, Result] = {}

    def ended(name: str, result: Result) -> None:
        results[name] = result
        print(
            f"{result['end'][-SHOWN:]}\n-- {name}: status {result['status']}, {result['seconds']} s",
            flush=True,
        )
        keep(name, result)

    try:
        for name, step in steps.items():
            seconds = budget.of(step.seconds)
            print(f"\n== {name}, {seconds:.0f} s at most\n$ {' '.join(map(str, step.command))}", flush=True)
            try:
                running[name] = _Running(step, seconds, logs / f"{name}.txt")
            except OSError as error:
                ended(name, dict(ok=False, status=f"not run: {error}", seconds=0.0, end=""))
        looked = 0.0
        while running:
            for name, program in list(running.items()):
                if (result := program.result()) is not None:
                    del running[name]
                    ended(name, result)
            if time.monotonic() - looked > 1:  # a run cut off here keeps its figures so far
                looked = time.monotonic()
                for name, program in running.items():
                    if (news := program.news()) is not None:
                        keep(name, news)
            time.sleep(0.05)
    finally:
        for program in running.values():
            program.kill()
    return results
