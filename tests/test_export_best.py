"""Exports of the best: the same bytes whatever stopped a run and however many ranks shared it; other settings are
refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models.conftest import small_pair
from var_ext import Sampler
from var_ext.checkpoints import CheckpointError
from var_ext.export import evaluation_plan, export_best, export_images, run, to_uint8
from var_ext.export.destinations import Scores

OPTIONS = {"cfg": 2.0, "top_k": 12, "top_p": 0.9}
CANDIDATES = evaluation_plan(
    [3, 1, 4], 12, seed=40, batch_size=5, **OPTIONS
)  # 36 in parts of 5, the last of 1
KINDS = ("images.npz", "images")


class Redness:
    """A score that counts what it is asked."""

    name, digest = "redness", "1"

    def __init__(self) -> None:
        self.scored = 0

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.scored += len(images)
        return torch.stack([image[0].double().mean() for image in images])


class Drawing(Sampler):
    """Counts the images that are drawn."""

    drawn = 0

    def _batches(self, *given: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
        for start, images, tokens in super()._batches(*given):
            self.drawn += len(tokens)
            yield start, images, tokens


@pytest.fixture(scope="module")
def models() -> tuple:
    return small_pair()


@pytest.fixture
def sampler(models: tuple) -> Drawing:
    return Drawing(*models)


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def set_rank(rank: int, world: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))

    return set_rank


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file there, hidden ones and leftovers too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(models: tuple, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What an export in one go leaves, by kind."""
    results = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("whole")
        export_best(Sampler(*models), CANDIDATES, folder / kind, Redness(), keep=0.25)
        results[kind] = contents(folder)
    return results


# ---------------------------------------------------------------------- what is written


def test_the_best_of_each_label_are_written(sampler: Drawing, tmp_path: Path) -> None:
    score = Redness()
    found = export_best(sampler, CANDIDATES, tmp_path / "a.npz", score, keep=0.25)
    assert score.scored == 36 and sampler.drawn == 36 + 9
    best = sampler.best_of(CANDIDATES.labels, CANDIDATES.seeds, score, 0.25, batch_size=5, **OPTIONS)
    plan = json.loads((tmp_path / "a.npz.plan.json").read_text())
    assert plan["labels"] == [3, 1, 4] * 3  # in turn
    for label in (3, 1, 4):
        mine = [seed for seed, each in zip(plan["seeds"], plan["labels"], strict=True) if each == label]
        assert mine == sorted(best.seeds[best.labels == label].tolist())
    drawn = sampler(plan["labels"], plan["seeds"], batch_size=5, **OPTIONS)
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], to_uint8(drawn).numpy())
    assert (found.kept, found.share) == (9, 0.25)
    assert found.mean_of_kept == pytest.approx(best.mean) and found.mean_of_all == pytest.approx(
        best.mean_of_all
    )
    assert found.mean_of_kept > found.mean_of_all


def test_plan_and_result_record_the_choice(sampler: Drawing, tmp_path: Path) -> None:
    found = export_best(sampler, CANDIDATES, tmp_path / "pngs/", Redness(), keep=np.int64(2))
    selection = {"keep": 2, "score": {"name": "redness", "digest": "1"}, "candidates": 36}
    for file in ("pngs/plan.json", "pngs.scores/plan.json", "pngs.scores/result.json"):
        assert json.loads((tmp_path / file).read_text())["selection"] == selection == found.selection
    result = json.loads((tmp_path / "pngs.scores/result.json").read_text())
    assert (result["kept"], result["share"], result["path"]) == (6, 6 / 36, "pngs")
    assert (result["mean_of_kept"], result["mean_of_all"]) == (found.mean_of_kept, found.mean_of_all)
    scores = np.load(tmp_path / "pngs.scores/scores.npy")
    wanted = Redness()(sampler(CANDIDATES.labels, CANDIDATES.seeds, batch_size=5, **OPTIONS), torch.tensor(0))
    assert np.array_equal(scores, wanted.numpy())
    assert sorted(path.name for path in (tmp_path / "pngs.scores").iterdir()) == [
        "plan.json", "result.json", "scores.npy",
    ]  # fmt: skip


def test_without_candidates_nothing_is_written(sampler: Drawing, tmp_path: Path) -> None:
    found = export_best(sampler, replace(CANDIDATES, labels=(), seeds=()), tmp_path / "a.npz", Redness())
    assert found.kept == 0 and np.load(found.path)["arr_0"].shape == (0, 8, 8, 3)


def test_labels_with_other_numbers_of_candidates_take_turns_while_they_last(sampler, tmp_path) -> None:
    plan = replace(CANDIDATES, labels=(1, 1, 1, 1, 2, 2), seeds=(9, 8, 7, 6, 5, 4))
    export_best(sampler, plan, tmp_path / "a.npz", Redness(), keep=0.5)
    assert json.loads((tmp_path / "a.npz.plan.json").read_text())["labels"] == [1, 2, 1]


# ---------------------------------------------------------------------- stopped, resumed, shared


class Stopped(BaseException):
    """Ctrl-C, at a chosen moment."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", [0, 3, 7, 8, 9])
def test_a_run_stopped_anywhere_goes_on(sampler, whole, tmp_path, monkeypatch, kind, after) -> None:
    """8 parts of scores, then 2 of images."""
    writes, score = [], Redness()

    def stopping(write: Callable) -> Callable:
        def stop(place: Any, part: range, values: np.ndarray) -> None:
            if len(writes) == after:
                raise Stopped
            writes.append(part)
            write(place, part, values)

        return stop

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        for cls in (Scores, run.place_of(kind, CANDIDATES, 8).__class__):
            patched.setattr(cls, "write", stopping(cls.write))
        export_best(sampler, CANDIDATES, tmp_path / kind, score, keep=0.25)
    score.scored = sampler.drawn = 0
    export_best(sampler, CANDIDATES, tmp_path / kind, score, keep=0.25)
    scored, images = max(36 - 5 * after, 0), 4 if after == 9 else 9
    assert (score.scored, sampler.drawn) == (scored, scored + images)
    assert contents(tmp_path) == whole[kind]
    sampler.drawn = 0
    export_best(sampler, CANDIDATES, tmp_path / kind, score, keep=0.25)  # and once more: nothing to do
    assert not sampler.drawn and contents(tmp_path) == whole[kind]


@pytest.mark.parametrize("moment", ["whole", "removing"])
def test_a_run_stopped_while_scores_are_put_together_goes_on(
    sampler, whole, tmp_path, monkeypatch, moment
) -> None:
    unlink, score = Path.unlink, Redness()

    def stop(path: Path, **given: Any) -> None:
        if path.name == "000003.npy":
            raise Stopped
        unlink(path, **given)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        if moment == "whole":
            patched.setattr(Scores, "read", lambda _: (_ for _ in ()).throw(Stopped))
        else:
            patched.setattr(Path, "unlink", stop)
        export_best(sampler, CANDIDATES, tmp_path / "images", score, keep=0.25)
    score.scored = 0
    export_best(sampler, CANDIDATES, tmp_path / "images", score, keep=0.25)
    assert not score.scored and contents(tmp_path) == whole["images"]


def test_a_part_of_scores_that_is_cut_short_is_drawn_again(sampler, whole, tmp_path, monkeypatch) -> None:
    score = Redness()
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Scores, "finish", lambda _: (_ for _ in ()).throw(Stopped))
        export_best(sampler, CANDIDATES, tmp_path / "images", score, keep=0.25)
    part = tmp_path / "images.scores/000002.npy"
    part.write_bytes(part.read_bytes()[:-1])
    score.scored = 0
    export_best(sampler, CANDIDATES, tmp_path / "images", score, keep=0.25)
    assert score.scored == 5 and contents(tmp_path) == whole["images"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_candidates_and_images(
    models, whole, tmp_path, as_rank, monkeypatch, kind, world
) -> None:
    """Each rank starts when the one before it waits; a rank that waits for scores goes on when they are there."""
    scored, started = [0] * world, set()

    def start(rank: int) -> None:
        started.add(rank)
        as_rank(rank, world)
        score = Redness()
        export_best(Sampler(*models), CANDIDATES, tmp_path / kind, score, keep=0.25, patience=100)
        scored[rank] = score.scored
        as_rank(0, world)

    def sleep(_: float) -> None:
        waiting = int(run.os.environ["RANK"])
        following = waiting + 1
        if following < world and following not in started:
            # the last rank finds all scores written; those before it wait for it alone
            start(following)
            as_rank(waiting, world)

    monkeypatch.setattr(run.time, "sleep", sleep)
    start(0)
    assert scored == {2: [20, 16], 3: [15, 11, 10]}[world]
    assert contents(tmp_path) == whole[kind]


def test_a_rank_does_not_wait_for_ever_for_scores(sampler, tmp_path, as_rank, monkeypatch) -> None:
    as_rank(1, 2)
    monkeypatch.setattr(run.time, "sleep", lambda _: None)
    with pytest.raises(
        CheckpointError, match=r"a.npz.scores lacks 4 of 8 parts, of rank 0 of 2, and none came in 3 s"
    ):
        export_best(sampler, CANDIDATES, tmp_path / "a.npz", Redness(), keep=0.25, patience=3)


# ---------------------------------------------------------------------- refused


class Another(Redness):
    name = "another"


class Later(Redness):
    digest = "2"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": 0.5}, "selection.keep: 0.25 there, 0.5 now"),
        ({"score": Another()}, "selection.score.name: 'redness' there, 'another' now"),
        ({"score": Later()}, "selection.score.digest: '1' there, '2' now"),
        (
            {"candidates": evaluation_plan([3, 1, 4], 16, seed=40, batch_size=5, **OPTIONS)},
            "candidates: 36 there, 48 now",
        ),
        (
            {"candidates": replace(CANDIDATES, options={**OPTIONS, "cfg": 3.0})},
            "options.cfg: 2.0 there, 3.0 now",
        ),
        (
            {"candidates": evaluation_plan([3, 1, 4], 12, seed=41, batch_size=5, **OPTIONS)},
            "seeds: from place 0 on",
        ),
    ],
)
@pytest.mark.parametrize("stage", ["scores", "images"])
def test_other_settings_are_refused(sampler, tmp_path, monkeypatch, stage, given, message) -> None:
    """While scores are drawn, and when images are there."""
    asked = {"candidates": CANDIDATES, "score": Redness(), "keep": 0.25}

    def export(candidates: Any, score: Any, keep: float) -> None:
        export_best(sampler, candidates, tmp_path / "a.npz", score, keep=keep)

    if stage == "scores":
        with monkeypatch.context() as patched, pytest.raises(Stopped):
            patched.setattr(Scores, "finish", lambda _: (_ for _ in ()).throw(Stopped))
            export(**asked)
    else:
        export(**asked)
    before, sampler.drawn = contents(tmp_path), 0
    with pytest.raises(CheckpointError, match=message):
        export(**{**asked, **given})
    assert not sampler.drawn and contents(tmp_path) == before


def test_a_plain_export_and_one_of_the_best_do_not_mix(sampler, tmp_path) -> None:
    export_images(sampler, CANDIDATES, tmp_path / "a.npz")
    sampler.drawn = 0
    with pytest.raises(CheckpointError, match=r"a.npz.plan.json is of other images: .*selection: None there"):
        export_best(sampler, CANDIDATES, tmp_path / "a.npz", Redness(), keep=1.0)
    assert not sampler.drawn and not (tmp_path / "a.npz.scores").exists()
    export_best(sampler, CANDIDATES, tmp_path / "b.npz", Redness(), keep=1.0)
    with pytest.raises(
        CheckpointError, match=r"b.npz.plan.json is of other images: .*selection: .* there, None now"
    ):
        export_images(sampler, CANDIDATES, tmp_path / "b.npz")


def test_strange_files_are_left_alone(sampler, tmp_path) -> None:
    (tmp_path / "a.npz.scores").mkdir()
    (tmp_path / "a.npz.scores/mine.txt").write_text("mine")
    with pytest.raises(
        CheckpointError, match=r"must be empty or hold scores of an earlier run .* holds mine.txt"
    ):
        export_best(sampler, CANDIDATES, tmp_path / "a.npz", Redness(), keep=0.25)
    assert not sampler.drawn


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        (0, ValueError, "keep must be a share"),
        (1.5, ValueError, "keep must be a share"),
        (13, ValueError, "got 13 of 12 of 3"),
        (0.05, ValueError, "less than one image: give at least 20"),
        ("2", TypeError, "keep must be a share"),
    ],
)
def test_bad_keeps_are_refused_before_the_work(sampler, tmp_path, keep, error, message) -> None:
    with pytest.raises(error, match=message):
        export_best(sampler, CANDIDATES, tmp_path / "a.npz", Redness(), keep=keep)
    assert not sampler.drawn and not contents(tmp_path)


def test_a_bad_score_writes_no_part(sampler, tmp_path) -> None:
    with pytest.raises(ValueError, match="finite numbers, got nan for label 3 and seed 40"):
        export_best(sampler, CANDIDATES, tmp_path / "a", lambda images, labels: labels / 0.0 * 0.0, keep=0.25)
    assert list(contents(tmp_path)) == ["a.scores/plan.json"]
