"""Files are complete or absent: a failed write leaves the old file, a bad file is named with the reason."""

import errno
import os
import threading
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from tests.disk import small_disk
from var_ext.checkpoints import (
    CheckpointError,
    atomic_write,
    check_writable,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
)
from var_ext.paths import user_path


def test_write_appears_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "a.bin"
    with atomic_write(target) as handle:
        handle.write(b"half")
        assert not target.exists()
        handle.write(b" whole")
    assert target.read_bytes() == b"half whole"
    assert os.listdir(target.parent) == ["a.bin"]


def test_a_rewritten_file_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "private").touch(0o600)
    with atomic_write(tmp_path / "private") as handle:
        assert all(
            path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir()
        )  # while it is written, too
        handle.write(b"x")
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "a") as handle:
            handle.write(b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_error_in_the_block_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_write(target) as handle:
        handle.write(b"new")
        raise error
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_write_that_fails_in_the_kernel_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "weights.safetensors"
    save_tensors(target, {"a": torch.arange(8.0)})
    match = r"weights\.safetensors: File too large; .* unchanged"
    with small_disk(), pytest.raises(CheckpointError, match=match):
        save_tensors(target, {"a": torch.zeros(100_000)})
    assert torch.equal(load_tensors(target)["a"], torch.arange(8.0))
    assert os.listdir(tmp_path) == [target.name]


def test_full_disk_at_the_last_moment_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "weights.safetensors"
    save_tensors(target, {"a": torch.arange(8.0)})

    def full(_: int) -> None:  # delayed allocation: the system may report a full disk only here
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_tensors(target, {"a": torch.zeros(8)})
    monkeypatch.undo()
    assert torch.equal(load_tensors(target)["a"], torch.arange(8.0))
    assert os.listdir(tmp_path) == [target.name]


def test_unwritable_paths_are_named(tmp_path: Path) -> None:
    # Permission bits do not bind the superuser, so the paths are impossible for everyone.
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "deep" / "a"):
        with (
            pytest.raises(CheckpointError, match=r"could not write .*/a: .*(?i:not a directory)"),
            atomic_write(path) as handle,
        ):
            handle.write(b"x")
    with (
        pytest.raises(
            CheckpointError, match=r"folder: it must be a file or not be there yet, and is a folder"
        ),
        atomic_write(tmp_path / "folder") as handle,
    ):
        handle.write(b"x")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_special_files_stay_what_they_are(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(CheckpointError, match=r"could not write .*pipe: .* is no regular file"),
        atomic_write(tmp_path / "pipe"),
    ):
        raise AssertionError("the block must not begin")
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(CheckpointError, match=r"could not write \.: .* is a folder"):
        check_writable("")  # as "."


def test_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(Path("there") / "a")
    for content in (b"first", b"second"):  # to a file that is not there yet, then to one that is
        with atomic_write(tmp_path / "link") as handle:
            handle.write(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there" / "a").read_bytes() == content


def test_whether_a_path_can_be_written_shows_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"could not write .*/file/a: .*(?i:not a directory)"):
        check_writable(tmp_path / "file" / "a")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_writers_of_one_path_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "a"
    contents = [bytes([65 + i]) * 200_000 for i in range(4)]

    def write(content: bytes) -> None:
        for _ in range(5):
            with atomic_write(target) as handle:
                handle.write(content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() in contents
    assert os.listdir(tmp_path) == ["a"]


def samples() -> dict[str, torch.Tensor]:
    wide = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "strided": wide[:, ::2],
        "transposed": wide.t(),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 5),
    }
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.uint8,
        torch.bool,
    ):
        tensors[f"kind.{dtype}"] = torch.arange(7).to(dtype)
    tensors["infinite"] = torch.tensor([-torch.inf, torch.nan, 0.0])
    tensors["parameter"] = torch.nn.Parameter(torch.ones(3))
    return tensors


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, samples(), {"step": "12", "note": "größer"})
    back = load_tensors(path)
    assert back.keys() == samples().keys()
    for name, tensor in samples().items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape, name
        assert torch.equal(back[name].nan_to_num(nan=5.0), tensor.nan_to_num(nan=5.0)), name
    with safetensors.safe_open(path, framework="pt") as reader:
        assert reader.metadata() == {"step": "12", "note": "größer"}


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xe9.safetensors")
    save_tensors(path, {"a": torch.arange(3)})
    write_json(path.with_suffix(".json"), {"name": str(path)})
    assert torch.equal(load_tensors(path)["a"], torch.arange(3))
    assert read_json(path.with_suffix(".json")) == {"name": str(path)}


def test_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tensors("~/a", {"a": torch.arange(3)})
    write_json("~/b/c.json", {"a": 1})
    assert torch.equal(load_tensors("~/a")["a"], torch.arange(3)) and read_json("~/b/c.json") == {"a": 1}
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert str(user_path("~nobody-by-this-name/a")) == "~nobody-by-this-name/a"


def test_file_is_what_the_library_writes(tmp_path: Path) -> None:
    # Same names, offsets and bytes: any reader of the format takes our files.
    tensors = {name: tensor.detach().contiguous() for name, tensor in samples().items()}
    save_tensors(tmp_path / "ours", tensors)
    ours = (tmp_path / "ours").read_bytes()
    theirs = safetensors.torch.save(tensors)
    length = int.from_bytes(ours[:8], "little")
    assert len(ours) - length == len(theirs) - int.from_bytes(theirs[:8], "little")
    for name, tensor in safetensors.torch.load(ours).items():
        assert torch.equal(tensor.nan_to_num(nan=5.0), tensors[name].nan_to_num(nan=5.0)), name


def test_dtype_without_a_place_in_the_format(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"phase must have one of the dtypes .*float32.* got torch\.complex64"
    ):
        save_tensors(tmp_path / "a", {"phase": torch.zeros(2, dtype=torch.complex64)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kept", [0, 4, 60, 500, -1])
def test_truncated_file(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"first": torch.zeros(100), "second": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors must be a complete safetensors file, but its \d+ bytes"
    ):
        load_tensors(path)


def test_foreign_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="another format"):
        load_tensors(path)
    with pytest.raises(CheckpointError, match=r"could not read .*nothing\.safetensors"):
        load_tensors(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="could not read"):
        load_tensors(tmp_path)


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"a": [1, 2.5, None, "größer"]})
    assert read_json(path) == {"a": [1, 2.5, None, "größer"]}
    for content, message in (
        (b"{", "must be a JSON object, but"),
        (b"[1]", "got list"),
        (b"\xff\xfe\x00", "but"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_json(path)
    with pytest.raises(CheckpointError, match="could not read"):
        read_json(tmp_path / "nothing.json")
