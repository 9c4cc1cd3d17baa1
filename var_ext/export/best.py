"""An export of the best of many candidates: rejection sampling for evaluation.

In two steps, each resumable and shared by ranks. All candidates are drawn and scored, and only the scores are written.
Then the best are drawn again, as any export, which costs their share of the time once more: an image is a function of
its label and seed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from var_ext.checkpoints import read_json, write_json
from var_ext.export.destinations import Scores, place_of
from var_ext.export.plan import Plan, compare
from var_ext.export.run import PATIENCE, export_images, fill, rank_and_world
from var_ext.sampling import Sampler
from var_ext.selection import Keeper, Kept, Score, check_keep, described


@dataclass(frozen=True)
class BestExport:
    """What `export_best` wrote.

    Attributes:
        path: of the images.
        selection: as in plan.json: keep, score with name and digest, number of candidates.
        kept: number of images.
        share: of the candidates that were kept; NaN without any.
        mean_of_kept, mean_of_all: mean scores.
    """

    path: Path
    selection: dict[str, Any]
    kept: int
    share: float
    mean_of_kept: float
    mean_of_all: float


def export_best(
    sampler: Sampler,
    candidates: Plan,
    out: str | os.PathLike[str],
    score: Score,
    *,
    keep: float | int = 0.05,
    progress: bool = False,
    patience: float = PATIENCE,
) -> BestExport:
    """Draw candidates, and write the images of the best of each label; see `selection` for what is published.

    Labels of the written images take turns, and images of a label come in the order of their seeds: the score decides
    which are there, not where. OUT.scores beside `out` keeps the scores of all candidates (scores.npy, in the order of
    the plan) and result.json. `keep`, the score and the number of candidates stand in plan.json, and a run that goes on
    with others is refused. A score without a `digest` is known by its name alone.

    On a GPU, where logits differ by rounding between batch sizes, an image of a last, smaller part may differ a little
    from the one that was scored.

    Args:
        candidates: of which images the best are kept.
        score, keep: as in `Sampler.best_of`.
        sampler, out, progress, patience: as in `export_images`.

    Raises:
        CheckpointError: as `export_images`.
        ValueError: as `export_images` and `Sampler.best_of`.
        TypeError: as `Sampler.best_of`.
    """
    check_keep(keep)
    keep = keep.item() if isinstance(keep, np.generic) else keep
    selection = {"keep": keep, "score": described(score), "candidates": len(candidates)}
    plan = replace(candidates, selection=selection)
    keeper: Keeper[None] = Keeper(plan.labels, plan.seeds, keep)  # refuses before the work
    _check_images(sampler, plan, out, sum(keeper.counts.values()))
    images = Path(os.path.abspath(place_of(out, plan, sampler.image_size).path))  # also of "." has a name
    place = Scores(images.with_name(f"{images.name}.scores"), plan)

    def scores(labels: list[int], seeds: list[int]) -> Iterator[np.ndarray]:
        options = {"batch_size": plan.batch_size, **plan.resolved(sampler)}
        return (found.numpy() for _, _, found in sampler.scored(labels, seeds, score, **options))

    fill(sampler, place, scores, progress=progress, patience=patience, together=True)
    for label, seed, value in zip(plan.labels, plan.seeds, place.read().tolist(), strict=True):
        keeper.offer(label, seed, value, lambda: None)
    kept = _in_turn(list(keeper.kept()))
    chosen = replace(plan, labels=tuple(each.label for each in kept), seeds=tuple(each.seed for each in kept))
    path = export_images(sampler, chosen, out, progress=progress, patience=patience)
    result = BestExport(
        path=path,
        selection=selection,
        kept=len(kept),
        share=len(kept) / len(plan) if kept else math.nan,
        mean_of_kept=fmean(each.score for each in kept) if kept else math.nan,
        mean_of_all=fmean(keeper.scores) if keeper.scores else math.nan,
    )
    if rank_and_world()[0] == 0 and kept:
        write_json(place.path / "result.json", {**asdict(result), "path": path.name})
    return result


def _check_images(sampler: Sampler, plan: Plan, out: str | os.PathLike[str], kept: int) -> None:
    """Raises CheckpointError if other images are at `out`, before candidates are drawn."""
    place = place_of(out, plan, sampler.image_size)
    place.check()
    if os.path.exists(place.plan_file):
        there, now = read_json(place.plan_file), plan.record(sampler)
        # which of the candidates are there, only the scores tell: here, that the number is right
        now["labels"] = now["seeds"] = kept
        compare(
            place.plan_file,
            {**there, "labels": _count(there, "labels"), "seeds": _count(there, "seeds")},
            now,
        )


def _count(record: dict[str, Any], name: str) -> int | None:
    values = record.get(name)
    return len(values) if isinstance(values, list) else None


def _in_turn(kept: list[Kept[None]]) -> list[Kept[None]]:
    """Labels taking turns, each in the order of its seeds: evaluation suites compute scores of runs of images."""
    rows: dict[int, list[Kept[None]]] = {}
    for each in sorted(kept, key=lambda each: each.seed):
        rows.setdefault(each.label, []).append(each)
    order = dict.fromkeys(each.label for each in kept)  # in which the labels first came
    turns = zip_longest(*(rows[label] for label in order))
    return [each for each in chain.from_iterable(turns) if each is not None]
