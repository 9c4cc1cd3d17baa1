"""Checkpoints: complete or refused with the reason, and never at the cost of the one before."""

import builtins
import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from tests.disk import small_disk
from var_ext.checkpoints import CheckpointError
from var_ext.training import checkpoint
from var_ext.training.checkpoint import DIGESTS, FORMAT, load_checkpoint, save_checkpoint
from var_ext.training.ranks import ALONE

PINS = {"kind": "var", "recipe": {"depth": 4, "seed": 0}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, PINS, 7, {"w": torch.arange(3.0), "note": "x", "none": None})
    return path


def test_round_trip(saved: Path) -> None:
    step, world, epochs, state = load_checkpoint(saved, PINS)
    assert (
        (step, world, epochs) == (7, 1, 0)
        and state["w"].tolist() == [0, 1, 2]
        and state["note"] == "x"
        and state["none"] is None
    )


def test_another_run_is_refused_with_every_difference(saved: Path) -> None:
    pins = {"kind": "var", "recipe": {"depth": 5, "seed": 0}, "data": "abc"}
    with pytest.raises(
        CheckpointError, match=r"wanted data = abc, got nothing; wanted recipe.depth = 5, got 4"
    ):
        load_checkpoint(saved, pins)


WHOLE: dict[str, object] = {
    "format": FORMAT, "pins": {}, "step": 7, "world": 1, "folder": None, "state": {},
}  # fmt: skip


@pytest.mark.parametrize("recipe", [[1], "recipe", {"epochs": "x"}, {"epochs": None}])
def test_pins_of_no_recipe_are_of_another_run(tmp_path: Path, recipe: object) -> None:
    torch.save(WHOLE | {"pins": {"recipe": recipe}}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="belongs to another run"):
        load_checkpoint(tmp_path / "x.ckpt", {"recipe": {"epochs": 2}})


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"wanted a training checkpoint .*last\.ckpt, got"):
        load_checkpoint(saved, PINS)


def test_digests_are_not_shown_but_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "x.ckpt", {DIGESTS: {"tokenizer": "ab", "training images": "cd"}}, 1, {})
    with pytest.raises(CheckpointError, match=r"another run: training images changed\. Start anew"):
        load_checkpoint(tmp_path / "x.ckpt", {DIGESTS: {"tokenizer": "ab", "training images": "ef"}})


@pytest.mark.parametrize(
    ("content", "came"),
    [
        ({"model": torch.zeros(2)}, "format None with the entries model"),
        ([1, 2], "list"),
        ({"format": "var_ext/train/0"}, "format var_ext/train/0 with"),
        ({"format": FORMAT}, f"format {FORMAT} with the entries format"),
        ({"format": FORMAT, "pins": PINS, "step": 7}, f"format {FORMAT} with the entries format, pins, step"),
        ({"format": FORMAT, "pins": 3, "step": 7, "state": {}}, f"format {FORMAT}"),
        (WHOLE | {"folder": "../elsewhere"}, f"format {FORMAT}"),
        (WHOLE | {"folder": 3}, f"format {FORMAT}"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: object, came: str) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=f"wanted a training checkpoint .*, got {came}"):
        load_checkpoint(tmp_path / "x.ckpt", PINS)


def test_a_file_with_code_is_refused_and_the_code_does_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    with open(tmp_path / "x.ckpt", "wb") as file:
        pickle.dump({"format": "var_ext/train/1", "payload": Payload()}, file, protocol=2)
    torch.save({"format": "var_ext/train/1", "payload": Payload()}, tmp_path / "y.ckpt")
    for name in ("x.ckpt", "y.ckpt"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_checkpoint(tmp_path / name, PINS)
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_keeps_the_old_checkpoint(saved: Path) -> None:
    before = saved.read_bytes()
    with small_disk(), pytest.raises(CheckpointError, match=r"could not write .*last\.ckpt"):
        save_checkpoint(saved, PINS, 8, {"w": torch.zeros(100_000)})
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_an_unwritable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(builtins, "open", deny)  # chmod does not stop a test that runs as root
    with pytest.raises(CheckpointError, match=r"could not write .*last\.ckpt: Permission denied"):
        save_checkpoint(tmp_path / "last.ckpt", PINS, 1, {})


@pytest.mark.parametrize(
    "error",
    [CheckpointException("save", {1: (OSError(28, "No space left"), None)}), OSError(28, "No space left")],
)
def test_shared_out_tensors_that_cannot_be_written_keep_the_old_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """torch's own error is no Exception: it would pass by all handlers as a traceback."""
    before = saved.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "_split", lambda state: ({}, {"w": state["w"]}))
    monkeypatch.setattr(checkpoint, "save", fail)
    with pytest.raises(
        CheckpointError, match=r"could not write .*last\.ckpt-8: .*No space left; .*last\.ckpt is kept"
    ):
        save_checkpoint(saved, PINS, 8, {"w": torch.zeros(3)})
    assert saved.read_bytes() == before
    monkeypatch.setattr(checkpoint, "load", fail)
    with pytest.raises(CheckpointError, match=r"wanted the tensors of a checkpoint in .*: .*No space left"):
        checkpoint._read_parts(
            saved.with_name("last.ckpt-8"), {"w": checkpoint.SHARED_OUT}, {"w": torch.zeros(3)}, ALONE
        )


@pytest.mark.parametrize("there", [False, True])
def test_an_older_file_is_told_of_only_where_there_is_one(tmp_path, monkeypatch, there) -> None:
    path = tmp_path / "last.ckpt"
    if there:
        path.write_bytes(b"of before")

    def full(*_: object) -> None:
        raise RuntimeError("unexpected pos 64 vs 0") from OSError("No space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="could not write") as error:
        save_checkpoint(path, {}, 8, {})
    assert ("is kept" in str(error.value)) is there and path.exists() is there
