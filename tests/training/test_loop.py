"""The loop on a toy task: batches, seeds, resume, selection, log."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from tests.disk import small_disk
from var_ext.checkpoints import CheckpointError
from var_ext.training.log import Diverged
from var_ext.training.loop import Moment, Task, epoch_batches, fit, own_folder, step_seed
from var_ext.training.recipes import Recipe


class Toy(Task):
    """One number that wanders with the batch and a random draw; its validation loss is lowest at step 6."""

    def __init__(
        self, stop: int | None = None, diverge: Mapping[str, int] | None = None, **options: Any
    ) -> None:
        self.recipe = Recipe(epochs=4, batch_size=3, checkpoint_every=2, log_every=1).with_options(**options)
        self.num_items, self.device = 9, torch.device("cpu")
        self.pins = {"recipe": self.recipe.pinned()}
        self.stop, self.value, self.steps = stop, torch.zeros(1), 0
        self.diverge = diverge or {}  # metric -> step from which on it is not finite

    def start(self) -> None:
        self.value = torch.rand(1)

    def feed(self, epoch: int, batches: Tensor) -> Iterable[Tensor]:
        return iter(batches)

    def step(self, at: Moment, batch: Tensor) -> Mapping[str, Any]:
        if at.step == self.stop:
            raise KeyboardInterrupt
        self.value = 0.9 * self.value + batch.sum() * torch.rand(1) * (at.epoch + 1)
        self.steps = at.step + 1
        return {
            "loss": self.metric("loss", float(self.value)),
            "grad": self.metric("grad", 1.0),
            "usage": [1.0, 2.5],
        }

    def validate(self) -> Mapping[str, Any]:
        # the last scale is best at step 9
        return {"loss": self.metric("val", abs(self.steps - 6)), "loss_last": abs(self.steps - 9)}

    def metric(self, name: str, value: float) -> float:
        return float("nan") if self.steps > self.diverge.get(name, self.steps) else value

    def weights(self) -> dict[str, Tensor]:
        return {"value": self.value.clone()}

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]


SPEED = {"seconds", "images_per_second", "data_wait", "peak_memory"}


def lines(out: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock and the machine."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in SPEED} for row in rows]


def test_batches_cover_an_epoch_and_differ_by_epoch_and_seed() -> None:
    batches = epoch_batches(0, 0, 10, 3)
    assert batches.shape == (4, 3) and set(batches.flatten().tolist()) == set(range(10))
    assert torch.equal(batches[-1, 1:], batches[0, :2])  # filled up from the beginning
    assert torch.equal(batches, epoch_batches(0, 0, 10, 3))
    assert not torch.equal(batches, epoch_batches(0, 1, 10, 3))
    assert not torch.equal(batches, epoch_batches(1, 0, 10, 3))
    assert epoch_batches(0, 0, 2, 64).shape == (1, 2)  # fewer images than a batch


def test_step_seeds_do_not_meet() -> None:
    assert len({step_seed(seed, step) for seed in range(20) for step in range(200)}) == 4000


@pytest.mark.parametrize("select", ["last", "best"])
@pytest.mark.parametrize("stop", [1, 2, 5, 11])
def test_a_stopped_run_resumes_to_the_same_weights_and_log(tmp_path: Path, stop: int, select: str) -> None:
    whole = fit(Toy(select=select), tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        fit(Toy(stop, select=select), tmp_path / "cut", progress=False)
    resumed = fit(Toy(select=select), tmp_path / "cut", progress=False)
    assert torch.equal(resumed["value"], whole["value"])
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_validations_by_steps_come_besides_those_by_epochs(tmp_path: Path) -> None:
    fit(Toy(validate_every=2, validate_steps=5), tmp_path, progress=False)  # 12 steps, 3 an epoch
    assert [row["step"] for row in lines(tmp_path) if row["phase"] == "val"] == [5, 6, 10, 12]


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    whole = fit(Toy(), tmp_path, progress=False)
    assert torch.equal(fit(Toy(stop=0), tmp_path, progress=False)["value"], whole["value"])


def test_no_resume_starts_anew(tmp_path: Path) -> None:
    whole = fit(Toy(), tmp_path, progress=False)
    with pytest.raises(KeyboardInterrupt):
        fit(Toy(stop=0), tmp_path, resume=False, progress=False)
    assert torch.equal(fit(Toy(), tmp_path, resume=False, progress=False)["value"], whole["value"])
    assert len(lines(tmp_path)) == 12 + 4


@pytest.mark.parametrize(("select", "step"), [("best", 6), ("best_last_scale", 9)])
def test_the_best_weights_are_kept(tmp_path: Path, select: str, step: int) -> None:
    best = fit(Toy(select=select), tmp_path / "best", progress=False)
    with pytest.raises(KeyboardInterrupt):
        fit(Toy(stop=step, checkpoint_every=3), tmp_path / "stopped", progress=False)
    # validation is at steps 3, 6, 9 and 12; the stopped run has the weights of the best one in its checkpoint
    stopped = torch.load(tmp_path / "stopped" / "last.ckpt", weights_only=True)
    assert stopped["step"] == step and torch.equal(best["value"], stopped["state"]["task"]["value"])


def test_another_recipe_does_not_take_the_checkpoint(tmp_path: Path) -> None:
    fit(Toy(), tmp_path, progress=False)
    with pytest.raises(CheckpointError, match=r"wanted recipe.seed = 1, got 0"):
        fit(Toy(seed=1), tmp_path, progress=False)
    fit(Toy(checkpoint_every=5), tmp_path, progress=False)  # does not change the weights


@pytest.mark.parametrize(
    ("diverge", "message"),
    [
        (
            {"loss": 0},
            "the loss of train must be finite, got nan at step 1: lower --lr and start anew, or go on with ",
        ),
        ({"grad": 0}, "the grad of train must be finite"),
        ({"val": 0}, "the loss of val must be finite, got nan at step 3"),
    ],
)
def test_a_diverged_run_stops(tmp_path: Path, diverge: dict[str, int], message: str) -> None:
    with pytest.raises(Diverged, match=message):
        fit(Toy(diverge=diverge, checkpoint_every=3), tmp_path, progress=False)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 0
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_a_step_that_is_not_logged_cannot_spoil_the_checkpoint(tmp_path: Path) -> None:
    kept = r"got nan at step 8: .* --on-divergence halve; .*last\.ckpt is kept"
    with pytest.raises(Diverged, match=kept):
        fit(Toy(diverge={"grad": 6}, log_every=100, validate_every=9), tmp_path, progress=False)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 6


def test_a_checkpoint_that_somebody_removed_is_not_called_kept(tmp_path: Path) -> None:
    class Robbed(Toy):
        def step(self, *args):
            (tmp_path / "last.ckpt").unlink(missing_ok=True)
            return super().step(*args)

    with pytest.raises(Diverged, match=r"on-divergence halve$"):
        fit(Robbed(diverge={"loss": 0}, checkpoint_every=3), tmp_path, progress=False)


def test_a_disk_that_fills_up_is_named_and_the_run_can_go_on(tmp_path: Path) -> None:
    match = r"could not write .*log\.jsonl: File too large"
    with small_disk(), pytest.raises(CheckpointError, match=match):
        fit(Toy(epochs=40), tmp_path, progress=False)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] > 10


def test_data_is_loaded_in_every_run_but_not_for_a_foreign_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(Toy, "load_data", lambda toy: calls.append(toy.recipe.seed))
    for seed in (0, 0):
        fit(Toy(seed=seed), tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="another run"):
        fit(Toy(seed=1), tmp_path, progress=False)
    assert calls == [0, 0]


def test_a_log_line_cut_by_a_kill_is_dropped(tmp_path: Path) -> None:
    fit(Toy(), tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        fit(Toy(5), tmp_path / "cut", progress=False)
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write('{"step": 6, "pha')
    fit(Toy(), tmp_path / "cut", progress=False)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_the_callers_random_numbers_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    fit(Toy(), tmp_path, progress=False)
    assert torch.equal(torch.rand(3), wanted)


def test_the_output_may_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"could not write .*file"):
        fit(Toy(), tmp_path / "file", progress=False)


def test_progress_shows_loss_and_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(Toy(), tmp_path)
    shown = capsys.readouterr().err
    assert "loss=" in shown and "usage=1/2" in shown and "val=" in shown


class Explosive(Toy):
    """Diverges at step 7 unless its rate was halved `need` times."""

    def __init__(self, need: int, stop: int | None = None, **options: Any) -> None:
        super().__init__(stop, **{"on_divergence": "halve", "checkpoint_every": 5, **options})
        self.need = need

    def step(self, at: Moment, batch: Tensor) -> Mapping[str, Any]:
        found = super().step(at, batch)
        return {**found, "loss": float("inf")} if at.step == 6 and self.rate > 0.5**self.need else found


def test_a_diverged_run_goes_back_with_half_the_rate(tmp_path: Path) -> None:
    whole = fit(Explosive(0), tmp_path / "whole", progress=False)
    halved = Explosive(2)
    found = fit(halved, tmp_path / "halved", progress=False)
    assert halved.rate == 0.25
    assert torch.equal(found["value"], whole["value"])  # the toy does not use its rate
    written = lines(tmp_path / "halved")
    assert [line for line in written if line["phase"] == "halve"] == [
        {"step": 5, "phase": "halve", "rate": rate} for rate in (0.5, 0.25)
    ]
    assert [line for line in written if line["phase"] != "halve"] == lines(tmp_path / "whole")


def test_the_halved_rate_is_kept_on_resume(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(Explosive(1, stop=11), tmp_path, progress=False)
    again = Explosive(1)
    fit(again, tmp_path, progress=False)
    assert again.rate == 0.5


def test_a_run_is_halved_three_times_at_most(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="got inf at step 7, with a learning rate halved 3 times: lower --lr;"):
        fit(Explosive(9), tmp_path, progress=False)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 5


def test_a_run_that_diverges_before_its_first_checkpoint_goes_back_to_the_start(tmp_path: Path) -> None:
    task = Explosive(1, checkpoint_every=100)
    assert torch.equal(
        fit(task, tmp_path / "a", progress=False)["value"],
        fit(Toy(), tmp_path / "b", progress=False)["value"],
    )
    assert lines(tmp_path / "a")[0] == {"step": 0, "phase": "halve", "rate": 0.5}


HOLD = """
import sys
from pathlib import Path
from var_ext.training.loop import own_folder
with own_folder(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_of_one_training_until_its_process_ends(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout and other.stdout.readline() == "mine\n"
    with pytest.raises(CheckpointError, match="in use by another training"), own_folder(tmp_path):
        pytest.fail("two trainings in a folder")
    (tmp_path / ".last.ckpt.1-abcd.tmp").touch()
    other.kill()
    other.wait()
    with own_folder(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", ".lock"}  # nor what it left
    with own_folder(tmp_path):
        pass


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def acquire(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with own_folder(tmp_path):
        assert "nothing keeps a second training out of it" in caplog.text
