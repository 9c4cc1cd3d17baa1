"""Exports: the same bytes whatever stopped a run and however many ranks shared it; nothing half done is trusted."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed, multiprocessing

import var_ext
from tests.disk import small_disk
from tests.models.conftest import small_pair
from tests.threads import threads
from var_ext import Sampler
from var_ext.checkpoints import CheckpointError
from var_ext.export import (
    Folder,
    Npz,
    Plan,
    evaluation_plan,
    export_images,
    local_device,
    place_of,
    rank_and_world,
    run,
    to_uint8,
)

OPTIONS = {"cfg": 2.0, "top_k": 12, "top_p": 0.9}
PLAN = evaluation_plan(5, 3, seed=40, batch_size=4, **OPTIONS)  # 15 images in parts of 4, 4, 4 and 3
KINDS = ("images.npz", "images")


class Drawing(Sampler):
    """Counts the images that are drawn."""

    drawn = 0

    def _batches(self, *given: object) -> Iterator:
        for start, images, tokens in super()._batches(*given):
            self.drawn += len(tokens)
            yield start, images, tokens


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """plan.json tells the number of threads, and ranks that are forked can have one."""
    with threads(1):
        yield


@pytest.fixture(scope="module")
def models() -> tuple:
    return small_pair()


@pytest.fixture
def sampler(models: tuple) -> Drawing:
    return Drawing(*models)


def contents(out: Path) -> dict[str, str]:
    """Hash of every file of an export, hidden ones and leftovers too."""
    files = [
        path for path in [*out.parent.glob(".*"), *out.parent.glob("*"), *out.rglob("*")] if path.is_file()
    ]
    return {
        str(path.relative_to(out.parent)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@pytest.fixture(scope="module")
def whole(models: tuple, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What an export in one go leaves, by kind."""
    results = {}
    for kind in KINDS:
        out = tmp_path_factory.mktemp("whole") / kind
        export_images(Sampler(*models), PLAN, out)
        results[kind] = contents(out)
    return results


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch):
    def set_rank(rank: int, world: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))

    return set_rank


# ---------------------------------------------------------------------- what is written


def test_npz_and_folder_hold_the_images_of_the_plan(sampler: Drawing, tmp_path: Path) -> None:
    npz = export_images(sampler, PLAN, tmp_path / "images.npz")
    folder = export_images(sampler, PLAN, str(tmp_path / "pngs"))
    with np.load(npz) as archive:
        assert archive.files == ["arr_0"]
        pixels = archive["arr_0"]
    assert pixels.dtype == np.uint8 and pixels.shape == (15, 8, 8, 3)
    pngs = sorted(folder.glob("*.png"))
    assert [path.name for path in pngs] == [f"{i:06d}.png" for i in range(15)]
    assert np.array_equal(pixels, np.stack([np.asarray(Image.open(path)) for path in pngs]))
    called = sampler(PLAN.labels, PLAN.seeds, batch_size=4, **OPTIONS)
    assert np.array_equal(pixels, (called * 255).floor().permute(0, 2, 3, 1).numpy())
    alone = torch.cat([sampler(*pair, **OPTIONS) for pair in zip(PLAN.labels, PLAN.seeds, strict=True)])
    np.testing.assert_allclose(
        pixels, to_uint8(alone).numpy(), atol=1
    )  # the same but for the last bits of sums
    assert sorted(os.listdir(tmp_path)) == ["images.npz", "images.npz.plan.json", "pngs"]


def test_npz_is_what_numpy_writes(sampler: Drawing, tmp_path: Path) -> None:
    path = export_images(sampler, PLAN, tmp_path / "a.npz")
    member = io.BytesIO()
    np.save(member, np.load(path)["arr_0"])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        (info,) = archive.infolist()
        assert info.compress_type == zipfile.ZIP_STORED
        assert archive.read("arr_0.npy") == member.getvalue()


def test_no_image_is_an_export_too(sampler: Drawing, tmp_path: Path) -> None:
    assert np.load(export_images(sampler, Plan((), ()), tmp_path / "a.npz"))["arr_0"].shape == (0, 8, 8, 3)
    assert os.listdir(export_images(sampler, Plan((), ()), tmp_path / "pngs")) == ["plan.json"]
    assert not sampler.drawn


def test_fractions_are_cut_off() -> None:
    values = torch.tensor([-0.5, 0.0, 0.9999 / 255, 1 / 255, 254.9 / 255, 1.0, 1.5])
    pixels = to_uint8(values.reshape(1, 1, 1, 7).expand(2, 3, 1, 7))
    assert pixels.shape == (2, 1, 7, 3) and pixels.is_contiguous()
    assert pixels[1, 0, :, 2].tolist() == [0, 0, 0, 1, 254, 255, 255]


def test_the_evaluation_plan_is_the_published_one() -> None:
    plan = evaluation_plan(1000)
    assert len(plan) == 50_000 == len(set(plan.seeds))
    assert plan.options == {"cfg": 1.5, "top_k": 900, "top_p": 0.96}
    # the Inception Score is computed of 5000 images at a time
    for start in range(0, 50_000, 5000):
        assert np.bincount(plan.labels[start : start + 5000], minlength=1000).tolist() == [5] * 1000
    assert evaluation_plan([7, 3], 2, seed=9, cfg=3.0).seeds == (9, 10, 11, 12)
    assert evaluation_plan([7, 3], 2).labels == (7, 3, 7, 3)
    assert len(evaluation_plan(10, 0)) == 0


def test_no_bar_unless_asked_for(
    sampler: Drawing, tmp_path: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="var_ext"):
        export_images(sampler, PLAN, tmp_path / "a.npz")
    assert "15 of 15 images" in caplog.text
    assert capfd.readouterr() == ("", "")
    export_images(sampler, PLAN, tmp_path / "b.npz", progress=True)
    out, err = capfd.readouterr()
    assert "15/15" in err and not out


# ---------------------------------------------------------------------- stopped and resumed


class Stopped(BaseException):
    """Ctrl-C, at a chosen moment."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", range(4))
def test_a_run_stopped_between_parts_goes_on(sampler, whole, tmp_path, monkeypatch, kind, after) -> None:
    cls = type(place_of(kind, PLAN, 8))
    write, writes = cls.write, []

    def stop(place, part, pixels):
        if len(writes) == after:
            raise Stopped
        writes.append(part)
        write(place, part, pixels)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(cls, "write", stop)
        export_images(sampler, PLAN, tmp_path / kind)
    assert not (tmp_path / "images.npz").exists()
    sampler.drawn = 0
    export_images(sampler, PLAN, tmp_path / kind)
    assert sampler.drawn == 15 - 4 * after
    assert contents(tmp_path / kind) == whole[kind]
    export_images(sampler, PLAN, tmp_path / kind)  # and once more: nothing to do
    assert sampler.drawn == 15 - 4 * after
    assert contents(tmp_path / kind) == whole[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_within_a_file_goes_on(sampler, whole, tmp_path, monkeypatch, kind) -> None:
    """As a killed process leaves it: half of the bytes under a hidden name."""
    replace, calls = os.replace, []

    def stop(source, target):
        calls.append(target)
        if len(calls) == 4:
            Path(source).with_name(f".{Path(target).name}.1-a.tmp").write_bytes(
                Path(source).read_bytes()[:50]
            )
            raise Stopped
        replace(source, target)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(os, "replace", stop)
        export_images(sampler, PLAN, tmp_path / kind)
    export_images(sampler, PLAN, tmp_path / kind)
    assert contents(tmp_path / kind) == whole[kind]


@pytest.mark.parametrize("where", ["assembling", "renaming", "cleaning"])
def test_a_run_stopped_at_its_end_draws_nothing_again(sampler, whole, tmp_path, monkeypatch, where) -> None:
    out = tmp_path / "images.npz"
    replace, pixels, calls = os.replace, Npz._pixels, []

    def stop_pixels(place, part):
        calls.append(part)
        if len(calls) == 3:  # the third part goes into the file
            raise Stopped
        return pixels(place, part)

    def stop_replace(source, target):
        if Path(target) == out:
            (tmp_path / f".{out.name}.1-a.tmp").write_bytes(b"killed here")
            raise Stopped
        replace(source, target)

    def stop_rmtree(path, **_):
        next(Path(path).iterdir()).unlink()
        raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        if where == "assembling":
            patched.setattr(Npz, "_pixels", stop_pixels)
        elif where == "renaming":
            patched.setattr(os, "replace", stop_replace)
        else:
            patched.setattr("shutil.rmtree", stop_rmtree)
        export_images(sampler, PLAN, out)
    assert out.exists() == (where == "cleaning")
    sampler.drawn = 0
    export_images(sampler, PLAN, out)
    assert contents(out) == whole["images.npz"] and not sampler.drawn


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def other_size(path: Path) -> None:
    if path.suffix == ".png":
        Image.new("RGB", (9, 8)).save(path)
    else:
        np.save(path, np.zeros((4, 9, 8, 3), np.uint8))


def other_kind(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


@pytest.mark.parametrize(
    "harm", [cut, emptied, other_size, other_kind, Path.unlink], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_file_is_drawn_again(sampler, whole, tmp_path, as_rank, kind, harm) -> None:
    for rank in (1, 2):
        as_rank(rank, 3)
        export_images(sampler, PLAN, tmp_path / kind)  # parts 1 and 2
    place = place_of(tmp_path / kind, PLAN, 8)
    harm(place.image(9) if isinstance(place, Folder) else place.part(PLAN.parts[2]))
    sampler.drawn = 0
    as_rank(0, 1)
    export_images(sampler, PLAN, tmp_path / kind)
    assert sampler.drawn == 4 + 3 + 4  # parts 0 and 3, and the broken one
    assert contents(tmp_path / kind) == whole[kind]


def test_a_finished_file_that_is_cut_short_is_drawn_again(sampler, whole, tmp_path) -> None:
    out = export_images(sampler, PLAN, tmp_path / "images.npz")
    cut(out)
    export_images(sampler, PLAN, out)
    assert contents(out) == whole["images.npz"]


# ---------------------------------------------------------------------- ranks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3, 6])
def test_ranks_share_the_parts(sampler, whole, tmp_path, as_rank, kind, world) -> None:
    drawn = []
    for rank in reversed(range(world)):
        sampler.drawn = 0
        as_rank(rank, world)
        export_images(sampler, PLAN, tmp_path / kind)
        drawn.insert(0, sampler.drawn)
    assert drawn == {2: [8, 7], 3: [7, 4, 4], 6: [4, 4, 4, 3, 0, 0]}[world]
    assert contents(tmp_path / kind) == whole[kind]


def test_rank_0_waits_for_the_others(sampler, whole, tmp_path, as_rank, monkeypatch) -> None:
    out, waits = tmp_path / "images.npz", []
    as_rank(0, 2)

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        assert not out.exists()
        if len(waits) == 3:
            as_rank(1, 2)
            export_images(sampler, PLAN, out)

    monkeypatch.setattr(run.time, "sleep", sleep)
    export_images(sampler, PLAN, out, patience=100)
    assert len(waits) == 3 and contents(out) == whole["images.npz"]


def test_which_ranks_are_waited_for_is_said_at_once(
    sampler, tmp_path, as_rank, monkeypatch, capfd, caplog
) -> None:
    as_rank(0, 3)
    sleeps = []

    def sleep(seconds: float) -> None:
        assert caplog.messages  # said before the first wait
        sleeps.append(seconds)
        if len(sleeps) in (2, 4):
            as_rank(len(sleeps) // 2, 3)
            export_images(sampler, PLAN, tmp_path / "images")

    monkeypatch.setattr(run.time, "sleep", sleep)
    with caplog.at_level("WARNING", logger="var_ext"):
        export_images(sampler, PLAN, tmp_path / "images")
    assert [message.split(" parts")[0] for message in caplog.messages] == [
        "waiting for rank 1, 2 of 3: 2 of 4",
        "waiting for rank 2 of 3: 1 of 4",
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("moment", "call"), [("write", 1), ("write", 3), ("finish", 1)])
def test_the_same_export_twice_at_once_ends(
    models, sampler, whole, tmp_path, monkeypatch, kind, moment, call
) -> None:
    """As srun starts it on a machine that tells no ranks: both are rank 0 of 1, and one finishes first."""
    out, cls, calls = tmp_path / kind, type(place_of(kind, PLAN, 8)), []
    method = getattr(cls, moment)

    def meanwhile(place, *args):
        calls.append(moment)
        if len(calls) == call:
            export_images(Sampler(*models), PLAN, out)
        return method(place, *args)

    monkeypatch.setattr(run.time, "sleep", lambda _: pytest.fail("waits for itself"))
    monkeypatch.setattr(cls, moment, meanwhile)
    export_images(sampler, PLAN, out)
    assert contents(out) == whole[kind]


@pytest.mark.parametrize("where", ["read", "renamed"])
def test_the_same_export_finishes_while_a_file_is_put_together(
    models, sampler, whole, tmp_path, monkeypatch, where
) -> None:
    out, other = tmp_path / "images.npz", []
    module, name = {"read": (Npz, "_pixels"), "renamed": (os, "replace")}[where]
    function = getattr(module, name)

    def meanwhile(*args, **kwargs):
        if not other and (where == "read" or Path(args[1]) == out):
            other.append(True)
            export_images(Sampler(*models), PLAN, out)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, meanwhile)
    export_images(sampler, PLAN, out)
    assert other and contents(out) == whole["images.npz"]


def test_remains_that_fill_the_disk_are_removed(sampler, whole, tmp_path, monkeypatch) -> None:
    out, assemble = tmp_path / "images.npz", Npz._assemble
    remains = tmp_path / f".{out.name}.1-a.tmp"

    def full(place):
        if remains.exists():
            raise CheckpointError("No space left on device")
        assemble(place)

    remains.write_bytes(b"of a run that was killed")
    monkeypatch.setattr(Npz, "_assemble", full)
    export_images(sampler, PLAN, out)
    assert contents(out) == whole["images.npz"]


def test_parts_that_vanish_are_missed_at_once(sampler, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run.time, "sleep", lambda _: pytest.fail("waits for itself"))
    monkeypatch.setattr(Npz, "write", lambda *_: None)
    with pytest.raises(CheckpointError, match=r"lacks 4 of 4 parts, of rank 0 of 1, and none came in 0 s"):
        export_images(sampler, PLAN, tmp_path / "images.npz")


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_vanishes_is_drawn_again(sampler, whole, tmp_path, monkeypatch, kind) -> None:
    out, lost = tmp_path / kind, []
    place = Npz if kind.endswith("npz") else Folder
    write = place.write

    def losing(self, part, values) -> None:
        write(self, part, values)
        if part.start == 8 and not lost:
            first = self.part(PLAN.parts[0]) if place is Npz else self.image(2)
            first.unlink()
            lost.append(first)

    monkeypatch.setattr(place, "write", losing)
    monkeypatch.setattr(run.time, "sleep", lambda _: pytest.fail("waits for itself"))
    export_images(sampler, PLAN, out)
    assert lost and contents(out) == whole[kind] and sampler.drawn == len(PLAN) + 4


def test_an_export_goes_on_with_the_same_sums_alone(sampler, whole, tmp_path, monkeypatch) -> None:
    """With 3 threads the decoder's pixels differ from those of 1: bytes of both would mix."""
    out = tmp_path / "images"
    with threads(1):
        export_images(sampler, PLAN, out)
        (out / "000003.png").unlink()
    with (
        threads(3),
        pytest.raises(CheckpointError, match=r"machine\.threads: 1 there, 3 now.*OMP_NUM_THREADS"),
    ):
        export_images(sampler, PLAN, out)
    before = var_ext._C.isa()
    var_ext._C.set_isa("portable")
    try:
        with threads(1), pytest.raises(CheckpointError, match=r"machine\.instructions: .*, 'portable' now"):
            export_images(sampler, PLAN, out)
    finally:
        var_ext._C.set_isa(before)
    plan = out / "plan.json"
    plan.write_text(json.dumps({k: v for k, v in json.loads(plan.read_text()).items() if k != "machine"}))
    with threads(1):
        export_images(sampler, PLAN, out)  # what an older version began is taken
    assert (out / "000003.png").exists()


def test_rank_0_does_not_wait_for_ever(sampler, whole, tmp_path, as_rank, monkeypatch) -> None:
    as_rank(0, 2)
    monkeypatch.setattr(run.time, "sleep", lambda _: None)
    with pytest.raises(CheckpointError, match=r"lacks 2 of 4 parts, of rank 1 of 2, and none came in 5 s"):
        export_images(sampler, PLAN, tmp_path / "images.npz", patience=5)
    as_rank(0, 1)
    sampler.drawn = 0
    export_images(sampler, PLAN, tmp_path / "images.npz")
    assert contents(tmp_path / "images.npz") == whole["images.npz"] and sampler.drawn == 7


def _gloo_rank(rank: int, store: str, out: str, models: tuple) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    export_images(Sampler(*models), PLAN, out)
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_of_a_process_group(models, whole, tmp_path, kind) -> None:
    (tmp_path / "out").mkdir()
    arguments = (str(tmp_path / "store"), str(tmp_path / "out" / kind), models)
    multiprocessing.start_processes(_gloo_rank, arguments, nprocs=2, start_method="fork")
    assert contents(tmp_path / "out" / kind) == whole[kind]


def test_torchrun(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [
        "-m",
        "var_ext",
        "sample",
        "--count",
        "2",
        "--batch-size",
        "3",
        "--labels",
        "3,8,5",
        "--threads",
        "1",
    ]
    out = tmp_path / "shared.npz"
    shared = subprocess.run(
        [sys.executable, *launcher, *command, "--quiet", "--out", str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shared.stdout.count("6 images of digits, seeds 0-5") == 1 and "img/s" not in shared.stderr
    digits = var_ext.load("digits")
    plan = evaluation_plan([3, 8, 5], 2, batch_size=3, **digits.defaults)
    export_images(digits, plan, out)  # the same plan: nothing to do
    assert out.read_bytes() == export_images(digits, plan, tmp_path / "alone.npz").read_bytes()


def test_ranks_come_from_the_environment(monkeypatch, as_rank) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert rank_and_world() == (0, 1)
    as_rank(1, 3)
    assert rank_and_world() == (1, 3)
    for rank, world in (("3", "3"), ("x", "3"), ("-1", "3"), ("1", "")):
        as_rank(rank, world)
        with pytest.raises(
            ValueError, match=f"RANK must be less than WORLD_SIZE, got '{rank}' and '{world}'"
        ):
            rank_and_world()
    assert local_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert [local_device(name) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:2", "cuda:0", "cpu"]


@pytest.mark.parametrize(
    ("rank", "world", "local"),
    [
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ],
)
def test_ranks_come_from_other_launchers(monkeypatch, as_rank, rank, world, local) -> None:
    for name, value in ((rank, "5"), (world, "8"), (local, "1")):
        monkeypatch.setenv(name, value)
    assert rank_and_world() == (5, 8) and local_device("cuda") == "cuda:1"
    monkeypatch.setattr(
        torch.cuda, "device_count", lambda: 1
    )  # a launcher may show each task its own GPU alone
    assert local_device("cuda") == "cuda"
    monkeypatch.setenv(world, "5")
    with pytest.raises(ValueError, match=f"{rank} must be less than {world}, got '5' and '5'"):
        rank_and_world()
    as_rank(1, 2)  # torchrun, started by them once a machine
    assert rank_and_world() == (1, 2)


def test_the_script_of_a_job_is_no_rank(monkeypatch) -> None:
    """SLURM tells it a rank and the tasks of the job, but it runs once."""
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert rank_and_world() == (0, 1)


# ---------------------------------------------------------------------- errors


def changed(**fields: object) -> Plan:
    return Plan(**{**vars(PLAN), **fields})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (changed(labels=(*PLAN.labels[:7], 0, *PLAN.labels[8:])), "labels: from place 7 on, 2 there, 0 now"),
        (changed(labels=PLAN.labels[:9], seeds=PLAN.seeds[:9]), "labels: 15 values there, 9 now"),
        (evaluation_plan(5, 3, seed=41, batch_size=4, **OPTIONS), "seeds: from place 0 on, 40 there, 41 now"),
        (changed(batch_size=5), "batch_size: 4 there, 5 now"),
        (
            changed(options={**OPTIONS, "cfg": 1.5}),
            r"options.cfg: 2.0 there, 1.5 now\. Write to another place",
        ),
        (
            changed(options={}),
            "options.cfg: 2.0 there, 1.5 now; options.top_k: 12 there, 900 now; options.top_p",
        ),
    ],
    ids=["labels", "fewer", "seeds", "batch_size", "cfg", "defaults"],
)
def test_another_plan_is_refused(sampler, whole, tmp_path, as_rank, kind, plan, message) -> None:
    as_rank(1, 2)
    export_images(sampler, PLAN, tmp_path / kind)  # one half
    before = contents(tmp_path / kind)
    for rank in (1, 0):
        as_rank(rank, 2)
        with pytest.raises(CheckpointError, match=message):
            export_images(sampler, plan, tmp_path / kind)
    assert contents(tmp_path / kind) == before
    as_rank(0, 1)
    export_images(sampler, PLAN, tmp_path / kind)
    with pytest.raises(CheckpointError, match=message):  # a finished export as well
        export_images(sampler, plan, tmp_path / kind)
    assert contents(tmp_path / kind) == whole[kind]


def test_another_model_is_refused(sampler, tmp_path) -> None:
    out = export_images(sampler, PLAN, tmp_path / "images")
    vae, var = small_pair()
    export_images(Sampler(vae, var), PLAN, out)  # the same weights in other models
    with torch.no_grad():
        var.head.weight.add_(1e-3)
    with pytest.raises(CheckpointError, match=r"is of other images: weights: '\w+' there, '\w+' now"):
        export_images(Sampler(vae, var), PLAN, out)
    with pytest.raises(CheckpointError, match=r"var\.depth: 2 there, 1 now; weights"):
        export_images(Sampler(*small_pair(depth=1)), PLAN, out)
    with pytest.raises(CheckpointError, match=r"precision: '\w+' there, 'int8' now"):
        export_images(Sampler(*small_pair(), precision="int8"), PLAN, out)


def test_what_is_not_ours_is_left_alone(sampler, tmp_path) -> None:
    (tmp_path / "000000.png").write_bytes(b"a picture")
    with pytest.raises(
        CheckpointError, match=r"must be empty or hold images .*plan\.json, but holds 000000\.png"
    ):
        export_images(sampler, PLAN, tmp_path)
    (tmp_path / "a.npz").write_bytes(b"an archive")
    with pytest.raises(CheckpointError, match=r"a\.npz is there without a\.npz\.plan\.json"):
        export_images(sampler, PLAN, tmp_path / "a.npz")
    assert sorted(os.listdir(tmp_path)) == ["000000.png", "a.npz"] and not sampler.drawn


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_that_cannot_be_written_is_named_before_the_work(sampler, kind, tmp_path) -> None:
    (tmp_path / "file").touch()
    for parent in (Path("/dev/null"), tmp_path / "file"):
        with pytest.raises(
            CheckpointError, match=rf"could not (read|write) {parent}/{kind}.*: Not a directory"
        ):
            export_images(sampler, PLAN, parent / kind)
    with pytest.raises(CheckpointError, match="Not a directory"):
        export_images(sampler, PLAN, tmp_path / "file")
    assert not sampler.drawn


def test_a_full_disk_is_named_and_what_fits_is_kept(sampler, whole, tmp_path) -> None:
    long = evaluation_plan(5, 5, batch_size=10)
    with small_disk(), pytest.raises(CheckpointError, match=r"could not write .*images\.npz: File too large"):
        # the parts are small, all of them together are not
        export_images(sampler, long, tmp_path / "images.npz")
    sampler.drawn = 0
    export_images(sampler, long, tmp_path / "images.npz")
    assert not sampler.drawn
    large = evaluation_plan(5, 5, batch_size=24)
    with small_disk(), pytest.raises(CheckpointError, match=r"parts/000000\.npy: File too large"):
        export_images(sampler, large, tmp_path / "large.npz")
    assert not os.listdir(tmp_path / "large.npz.parts")
    side = Folder(tmp_path, Plan((0,), (0,)), 64)
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    with small_disk(), pytest.raises(CheckpointError, match=r"000000\.png: File too large"):
        side.write(range(1), noise)
    assert not list(tmp_path.glob("*.png"))


def test_plans_of_numpy_and_torch_are_those_of_python(sampler, whole, tmp_path) -> None:
    labels, seeds = np.array(PLAN.labels, np.uint8), torch.tensor(PLAN.seeds)
    plan = Plan(labels, seeds, {**OPTIONS, "top_k": np.int64(12)}, batch_size=np.int64(4))
    export_images(sampler, plan, tmp_path / "images")
    assert contents(tmp_path / "images") == whole["images"]
    for classes in (np.int64(5), np.arange(5), torch.arange(5)):
        assert evaluation_plan(classes, np.int64(3), seed=np.int64(40), batch_size=4, **OPTIONS) == PLAN
    with pytest.raises(TypeError):
        Plan((1.5,), (0,))


def test_unsigned_seeds_are_those_with_the_same_bits(sampler, tmp_path) -> None:
    export_images(sampler, Plan((1, 2), (2**63, 2**64 - 1)), tmp_path / "a")
    export_images(sampler, Plan((1, 2), (-(2**63), -1)), tmp_path / "b")
    for name in ("000000.png", "000001.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_home_is_found_and_capitals_are_an_archive(sampler, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert export_images(sampler, PLAN, "~/A.NPZ") == tmp_path / "A.NPZ"
    assert np.load(tmp_path / "A.NPZ")["arr_0"].shape == (15, 8, 8, 3)


def test_wrong_plans_are_named(sampler, tmp_path) -> None:
    with pytest.raises(ValueError, match="a seed a label, got 2 and 1"):
        Plan((1, 2), (3,))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Plan((), (), batch_size=0)
    with pytest.raises(ValueError, match="per_class must be 0 or more, got -1"):
        evaluation_plan(5, -1)
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"labels must be in 0..5 \(5: no class\), got \[7, -1\]"):
            export_images(sampler, Plan((1, 7, -1), (0, 0, 0)), tmp_path / kind)
    assert not os.listdir(tmp_path)
    with pytest.raises(TypeError, match="heat"):
        export_images(sampler, Plan((1,), (0,), {"heat": 1}), tmp_path / "b.npz")
    assert not sampler.drawn


def test_the_name_says_the_kind() -> None:
    assert [
        type(place_of(out, PLAN, 8)) for out in ("a.npz", Path("a.npz"), "A.NPZ", "a", "a.npz/", "a.png/")
    ] == [
        Npz,
        Npz,
        Npz,
        Folder,
        Folder,
        Folder,
    ]
