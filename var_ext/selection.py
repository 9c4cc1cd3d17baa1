"""Rejection sampling: of many candidates of a label, the best by a score are kept.

How the paper filtered its rows with rejection sampling is not published. Known is that a classifier trained on ImageNet
was the filter (github.com/FoundationVision/VAR, issue 161), not its rule nor the share kept: images chosen here are not
to be set beside those rows. Others are said to have kept 5% by a classifier (MaskGIT, arXiv 2202.04200), or a top share
by its probability of the asked class (VQ-VAE-2, arXiv 1906.00446).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappush, heapreplace
from statistics import fmean
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

# Images (B, 3, S, S) float32 in [0, 1] and labels (B,) int64, both on the sampler's device, to numbers (B,): higher is
# better. A score with a true attribute `reads_tokens` is given the drawn tokens (B, L) int64 instead of the images.
# `name` and `digest`, where it has them, go into the record of an export.
Score = Callable[[Tensor, Tensor], Any]
T = TypeVar("T")


def _share(keep: float) -> Fraction:
    """A share as it is written: 0.29 is 29 of 100, and not a little less."""
    return Fraction(repr(float(keep)))


def check_keep(keep: float | int) -> None:
    """Raises unless `keep` is a share or a number of images.

    Raises:
        ValueError: a share is not in (0, 1], or a number is less than 1.
        TypeError: it is neither float nor int.
    """
    wanted = "keep must be a share (a float in (0, 1]) or a number of images (an int of at least 1)"
    if isinstance(keep, bool) or not isinstance(keep, int | float | np.integer | np.floating):
        raise TypeError(f"{wanted}, got {keep!r}")
    whole = isinstance(keep, int | np.integer)
    if not (keep >= 1 if whole else 0 < keep <= 1):
        raise ValueError(f"{wanted}, got {keep}")


def count_kept(keep: float | int, candidates: int, label: int) -> int:
    """How many of the candidates of a label are kept: a share is rounded down.

    Raises:
        ValueError: that is not even one, or there are fewer candidates; or `keep` is out of range, as in `check_keep`.
        TypeError: as in `check_keep`.
    """
    check_keep(keep)
    if isinstance(keep, int | np.integer):
        if keep > candidates:
            raise ValueError(
                f"keep must be at most the candidates of a label, got {keep} of {candidates} of {label}"
            )
        return int(keep)
    if count := int(_share(keep) * candidates):
        return count
    raise ValueError(
        f"keep {keep:g} of the {candidates} candidates of label {label} is less than one image: give at least "
        f"{count_candidates(keep, 1)}, or keep a number"
    )


def count_candidates(share: float, kept: int) -> int:
    """The smallest number of candidates of which a share is `kept`. Raises as `check_keep`."""
    check_keep(float(share))
    return math.ceil(kept / _share(share))


def described(score: Score) -> dict[str, str | None]:
    """What an export records of a score: its name and digest, without them a function's name and None."""
    name = getattr(score, "name", None) or getattr(score, "__name__", type(score).__name__)
    return {"name": str(name), "digest": getattr(score, "digest", None)}


def scores_of(score: Score, given: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
    """What a score says of a batch, checked: (B,) float64 on the CPU.

    Args:
        score: the hook.
        given: images or tokens, whichever it reads.
        labels: (B,) int64 on the device of `given`.
        seeds: (B,) int64, for the message.

    Raises:
        ValueError: it returned another shape, or a number that is not finite.
        TypeError: it returned no numbers.
    """
    with torch.no_grad():
        answer = score(given, labels)
    try:
        found = torch.as_tensor(answer).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        came = type(answer).__name__
        raise TypeError(f"score must return a number for each of {len(labels)} images, got {came}") from error
    if found.shape != labels.shape:
        wanted = f"score must return a number for each of {len(labels)} images, ({len(labels)},)"
        raise ValueError(f"{wanted}, got shape {tuple(found.shape)}")
    found = found.to("cpu", torch.float64)
    if not found.isfinite().all():
        at = int((~found.isfinite()).nonzero()[0, 0])
        came = f"{found[at].item()} for label {labels[at].item()} and seed {seeds[at].item()}"
        raise ValueError(f"score must return finite numbers, got {came}")
    return found


@dataclass(frozen=True)
class Kept(Generic[T]):
    """A candidate that was kept."""

    label: int
    seed: int
    score: float
    item: T


class Keeper(Generic[T]):
    """Keeps the best candidates of each label: a heap a label, its worst on top. Of equal scores the lower seed wins.

    Args:
        labels, seeds: of all candidates.
        keep: a share or a number of those of each label.

    Raises:
        ValueError: a label and seed are there twice (that is one image); or as in `count_kept`.
        TypeError: as in `check_keep`.
    """

    def __init__(self, labels: Sequence[int], seeds: Sequence[int], keep: float | int) -> None:
        check_keep(keep)
        candidates: dict[int, set[int]] = {}
        for label, seed in zip(labels, seeds, strict=True):
            mine = candidates.setdefault(label, set())
            if seed in mine:
                raise ValueError(
                    f"candidates must differ in label or seed, got label {label} with seed {seed} twice"
                )
            mine.add(seed)
        self.counts = {label: count_kept(keep, len(mine), label) for label, mine in candidates.items()}
        self._heaps: dict[int, list[tuple[float, int, T]]] = {label: [] for label in candidates}
        self.scores: list[float] = []  # of all candidates so far

    def offer(self, label: int, seed: int, score: float, item: Callable[[], T]) -> None:
        """A candidate; `item` is called only if it is kept for now."""
        self.scores.append(score)
        heap, key = self._heaps[label], (score, -seed)
        if len(heap) < self.counts[label]:
            heappush(heap, (*key, item()))  # seeds differ: items are never compared
        elif key > heap[0][:2]:
            heapreplace(heap, (*key, item()))

    def kept(self) -> Iterator[Kept[T]]:
        """Labels in the order in which they first came, the best of each first."""
        for label, heap in self._heaps.items():
            for score, negative, item in sorted(heap, key=lambda entry: entry[:2], reverse=True):
                yield Kept(label, -negative, score, item)


@dataclass(frozen=True)
class Best:
    """The M candidates that were kept: labels in the order in which they first came, the best first.

    Attributes:
        images: (M, 3, S, S) float32 in [0, 1], on the sampler's device.
        labels, seeds: (M,) int64, on the CPU.
        scores: (M,) float64, on the CPU.
        candidates: how many there were.
        mean_of_all: mean score of all candidates; NaN without any.
    """

    images: Tensor
    labels: Tensor
    seeds: Tensor
    scores: Tensor
    candidates: int
    mean_of_all: float

    @classmethod
    def of(cls, keeper: Keeper[Tensor], nothing: Tensor) -> Best:
        """What was kept; `nothing` (0, 3, S, S) is the answer without candidates."""
        kept = list(keeper.kept())
        return cls(
            images=torch.stack([each.item for each in kept]) if kept else nothing,
            labels=torch.tensor([each.label for each in kept], dtype=torch.int64),
            seeds=torch.tensor([each.seed for each in kept], dtype=torch.int64),
            scores=torch.tensor([each.score for each in kept], dtype=torch.float64),
            candidates=len(keeper.scores),
            mean_of_all=fmean(keeper.scores) if keeper.scores else math.nan,
        )

    @property
    def mean(self) -> float:
        """Mean score of the kept; NaN without any."""
        return fmean(self.scores.tolist()) if len(self.scores) else math.nan

    @property
    def share(self) -> float:
        """Of the candidates that were kept; NaN without any."""
        return len(self.scores) / self.candidates if self.candidates else math.nan
