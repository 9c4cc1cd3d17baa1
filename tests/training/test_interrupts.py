"""Checkpoints on signals and by the clock, and the agreement of ranks about them."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.ranked import environment, launch
from tests.training.test_loop import Toy
from var_ext.training.interrupts import STOPPED, Interrupts
from var_ext.training.loop import Moment, fit
from var_ext.training.ranks import ALONE


class Signalled(Toy):
    """Gets a signal in a step."""

    def __init__(self, number: int, at: int, **options: Any) -> None:
        super().__init__(**{"checkpoint_every": 100, **options})
        self.number, self.when = number, at
        self.saved: list[int] = []

    def step(self, at: Moment, batch: Tensor) -> Mapping[str, Any]:
        if at.step == self.when:
            os.kill(os.getpid(), self.number)
        return super().step(at, batch)

    def state_dict(self) -> dict[str, Any]:
        self.saved.append(self.steps)
        return super().state_dict()


def test_sigterm_saves_ends_with_75_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = fit(Toy(), tmp_path / "whole", progress=False)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        fit(Signalled(signal.SIGTERM, 4), tmp_path / "cut", progress=False)
    assert ended.value.code == STOPPED == 75
    assert signal.getsignal(signal.SIGTERM) is before
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("SIGTERM: stopped after step 6 of 12") and line.endswith(
        "the same command goes on"
    )
    assert torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)["step"] == 6
    assert torch.equal(fit(Toy(), tmp_path / "cut", progress=False)["value"], whole["value"])


def test_sigusr1_saves_and_the_run_ends_as_without(tmp_path: Path) -> None:
    task = Signalled(signal.SIGUSR1, 4)
    found = fit(task, tmp_path / "a", progress=False)
    assert task.saved == [0, 6, 12]
    assert torch.equal(found["value"], fit(Toy(), tmp_path / "b", progress=False)["value"])


def test_sigterm_in_the_last_step_lets_the_run_end(tmp_path: Path) -> None:
    fit(Signalled(signal.SIGTERM, 11), tmp_path, progress=False)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 12


@pytest.mark.parametrize("minutes", [0.0, 1e-9, 60.0])
def test_checkpoints_by_minutes(tmp_path: Path, minutes: float) -> None:
    """A clock that is due at every step, and one that never is."""
    task = Signalled(0, 0, checkpoint_minutes=minutes)
    fit(task, tmp_path, progress=False)
    assert task.saved == ([*range(13)] if minutes == 1e-9 else [0, 12])


def test_a_diverged_step_is_not_saved_on_a_signal(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="got nan at step 6"):
        task = Signalled(signal.SIGUSR1, 4, log_every=100, validate_every=9, checkpoint_every=3)
        task.diverge = {"grad": 4}
        fit(task, tmp_path, progress=False)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 3


def test_in_another_thread_signals_keep_their_effect() -> None:
    before = signal.getsignal(signal.SIGTERM)
    inside = []

    def enter() -> None:
        with Interrupts(ALONE, 0):
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [before]


RANK = """
import json, signal, sys
from pathlib import Path
from tests.training.test_interrupts import Signalled
from var_ext.training.loop import fit
from var_ext.training.ranks import join

out = Path(sys.argv[1])
with join("cpu", 25) as (ranks, _):
    number, at = (signal.SIGUSR1, 5) if ranks.rank == 0 else (signal.SIGTERM, 8)
    task = Signalled(number, at)
    task.ranks = ranks
    try:
        fit(task, out, progress=False)
    except SystemExit as end:
        (out / f"rank-{ranks.rank}.json").write_text(json.dumps([end.code, task.saved]))
"""


@pytest.mark.slow
def test_ranks_agree_where_only_one_gets_the_signal(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    done = subprocess.run(
        launch(2, str(script), str(tmp_path)), env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert found == [[75, [0, 7, 10]]] * 2
    assert done.stderr.count("SIGTERM: stopped after step 10 of 12") == 1
