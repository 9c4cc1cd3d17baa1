"""Recommended sampling settings, chosen on validation images so that the test split stays unseen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from var_ext.evaluation.digits import check_sampler, draw
from var_ext.evaluation.judge import DigitsJudge

if TYPE_CHECKING:
    from var_ext.sampling import Sampler


@dataclass(frozen=True)
class Trial:
    """A point of the grid: class accuracy of its samples, their Fréchet distance to the validation split."""

    cfg: float
    top_k: int
    top_p: float
    accuracy: float
    frechet: float

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of a sampler's call."""
        return {"cfg": self.cfg, "top_k": self.top_k, "top_p": self.top_p}


@dataclass(frozen=True)
class Choice:
    """The chosen trial, all trials, and the accuracy on real validation images they are compared with."""

    best: Trial
    trials: tuple[Trial, ...]
    real_accuracy: float
    images_per_class: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def pick(trials: Sequence[Trial], floor: float) -> Trial:
    """The smallest Fréchet distance among trials of at least this accuracy, else the most accurate trial."""
    able = [trial for trial in trials if trial.accuracy >= floor]
    if able:
        return min(able, key=lambda trial: trial.frechet)
    return max(trials, key=lambda trial: (trial.accuracy, -trial.frechet))


def choose_sampling(
    sampler: Sampler,
    *,
    cfgs: Sequence[float],
    top_ks: Sequence[int],
    top_ps: Sequence[float],
    images_per_class: int = 50,
    seed: int = 1_000_000,
    margin: float = 0.02,
    batch_size: int = 50,
    progress: bool = False,
) -> Choice:
    """Tries settings on the validation split: first every guidance, then top-k and top-p at the best one.

    Guidance matters most and is tried with the first top_k and top_p. Every trial draws the same (label,
    seed) pairs, which makes their differences less noisy. The seeds differ from those of
    `evaluate_digits`, so that settings are not chosen on the images that are measured.

    Args:
        sampler: a model of 10 classes.
        cfgs, top_ks, top_ps: the values to try, at least one each.
        images_per_class: samples of each class and trial.
        seed: the first seed.
        margin: how far below the accuracy on real images the accuracy of an eligible trial may lie.

    Raises:
        ValueError: not ten classes, images too small, an empty grid, no samples.
    """
    check_sampler(sampler)
    if not (cfgs and top_ks and top_ps):
        raise ValueError(f"there must be a cfg, a top_k and a top_p to try, got {cfgs}, {top_ks}, {top_ps}")
    if images_per_class < 1:
        raise ValueError(f"images_per_class must be at least 1, got {images_per_class}")
    judge = DigitsJudge(sampler.image_size, "val")
    floor = judge.real_accuracy - margin
    trials: list[Trial] = []
    rest = list(product(top_ks, top_ps))
    with tqdm(total=len(cfgs) + len(rest) - 1, desc="settings", unit="trial", disable=not progress) as bar:

        def attempt(cfg: float, top_k: int, top_p: float) -> None:
            settings: dict[str, Any] = {"cfg": cfg, "top_k": top_k, "top_p": top_p}
            samples = draw(sampler, images_per_class, seed, batch_size=batch_size, **settings)
            accuracy, distance = judge.accuracy(samples), judge.frechet(samples, judge.real)
            trials.append(Trial(**settings, accuracy=accuracy, frechet=distance))
            bar.update()

        for cfg in cfgs:
            attempt(cfg, *rest[0])
        guidance = pick(trials, floor).cfg
        for top_k, top_p in rest[1:]:
            attempt(guidance, top_k, top_p)
    return Choice(pick(trials, floor), tuple(trials), judge.real_accuracy, images_per_class)
