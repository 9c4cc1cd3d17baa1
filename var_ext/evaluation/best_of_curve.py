"""`best_of_curve`: what rejection sampling does to generated digits, by the share that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from var_ext.evaluation.digits import check_sampler, settings_of
from var_ext.evaluation.judge import CLASSES, DigitsJudge, Labelled, grey
from var_ext.selection import Keeper, Score, count_candidates, described

if TYPE_CHECKING:
    from var_ext.sampling import Sampler


@dataclass(frozen=True)
class BestOf:
    """A share: the images kept at it, always as many."""

    keep: float
    candidates: int  # of each class
    score: float  # mean of the kept
    accuracy: float  # share of the kept that the judge reads as the asked class
    frechet: float  # squared Fréchet distance of the kept to the real split
    spread: float  # mean pixel L2 between two of a class


@dataclass(frozen=True)
class BestOfCurve:
    """Result of `best_of_curve`; `real` figures are of the split, `train_frechet` of all training images to it."""

    split: str
    score: dict[str, str | None]  # name and digest
    sampling: dict[str, Any]
    seed: int
    images_per_class: int
    rows: tuple[BestOf, ...]
    num_real: int
    real_accuracy: float
    real_spread: float
    train_frechet: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def as_markdown(self) -> str:
        """A table, a row a share."""
        settings = ", ".join(f"{name} {value}" for name, value in self.sampling.items())
        name = self.score["name"]
        head = [
            f"The best {self.images_per_class} of each class by {name}, of as many candidates as the share says "
            f"({settings}, seeds from {self.seed}); {self.num_real} real images of the {self.split!r} split.",
            "",
            "| share kept | candidates a class | mean score | asked class | Fréchet distance | pixel L2 in a class |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        cells = [
            (f"{row.keep:g}", str(row.candidates), f"{row.score:.4f}", f"{100 * row.accuracy:.1f}%",
             f"{row.frechet:.2f}", f"{row.spread:.2f}")
            for row in self.rows
        ]  # fmt: skip
        real = ("real (distance: training images)", "", "", f"{100 * self.real_accuracy:.1f}%")
        cells.append((*real, f"{self.train_frechet:.2f}", f"{self.real_spread:.2f}"))
        foot = (
            ["", "The judge that chose them calls them right: distance and spread tell."]
            if name == "judge"
            else []
        )
        return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in cells), *foot]) + "\n"


def best_of_curve(
    sampler: Sampler,
    score: Score,
    *,
    shares: Sequence[float] = (1.0, 0.5, 0.25, 0.1, 0.05),
    images_per_class: int = 40,
    seed: int = 0,
    split: str = "test",
    cfg: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    judge: DigitsJudge | None = None,
) -> BestOfCurve:
    """Accuracy and Fréchet distance of digits against the share kept.

    Every share keeps as many images, because the distance depends on their number: a small share has more candidates.
    All shares choose from the same drawing, share s from the first images_per_class / s seeds of each class.

    Args:
        sampler: a model of 10 classes.
        score: as in `Sampler.best_of`; `scoring` has some.
        shares: in (0, 1].
        images_per_class: kept of each class; 40 is as many as the real split "test" has.
        seed: class c has the seeds from seed + c * candidates on.
        split, cfg, top_k, top_p, progress, judge: as in `evaluate_digits`.
        batch_size: as in a call of the sampler.

    Raises:
        ValueError: not ten classes, images smaller than 8x8, no shares, one out of range, or images_per_class is less
            than 2; or as in `Sampler.scored`.
    """
    check_sampler(sampler)
    if not shares or images_per_class < 2:
        raise ValueError(
            f"there must be a share, and images_per_class must be at least 2, got {list(shares)} and {images_per_class}"
        )
    counts = {share: count_candidates(share, images_per_class) for share in shares}
    judge = judge or DigitsJudge(sampler.image_size, split)
    settings = settings_of(sampler, cfg=cfg, top_k=top_k, top_p=top_p)
    most = max(counts.values())
    labels = torch.arange(CLASSES).repeat_interleave(most)
    seeds = torch.arange(seed, seed + len(labels))
    images, values = [], []
    for _, part, scores in sampler.scored(
        labels, seeds, score, batch_size=batch_size, progress=progress, **settings
    ):
        images.append(grey(part.cpu()))
        values.append(scores)
    pool, score_of = Labelled(torch.cat(images), labels), torch.cat(values)

    rows = []
    for share, count in counts.items():
        first = (torch.arange(CLASSES)[:, None] * most + torch.arange(count)).flatten()
        keeper: Keeper[int] = Keeper(labels[first].tolist(), seeds[first].tolist(), images_per_class)
        for i in first.tolist():
            keeper.offer(int(labels[i]), int(seeds[i]), float(score_of[i]), partial(int, i))
        best = torch.tensor([each.item for each in keeper.kept()])
        kept = pool.take(best)
        rows.append(
            BestOf(
                keep=share,
                candidates=count,
                score=float(score_of[best].mean()),
                accuracy=judge.accuracy(kept),
                frechet=judge.frechet(kept, judge.real),
                spread=judge.spread(kept),
            )
        )
    return BestOfCurve(
        split=split,
        score=described(score),
        sampling=settings,
        seed=seed,
        images_per_class=images_per_class,
        rows=tuple(rows),
        num_real=len(judge.real),
        real_accuracy=judge.real_accuracy,
        real_spread=judge.spread(judge.real),
        train_frechet=judge.frechet(judge.train, judge.real),
    )
