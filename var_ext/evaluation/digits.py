"""`evaluate_digits`: are samples the requested digits, as varied as real ones, and not copies?"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from var_ext.evaluation.judge import CLASSES, SCAN, DigitsJudge, Labelled, draw_like, grey, halves, read_split
from var_ext.evaluation.report import DigitsReport, FrechetTable, NeighbourTable

if TYPE_CHECKING:
    from var_ext.sampling import Sampler


def settings_of(sampler: Sampler, **given: float | None) -> dict[str, Any]:
    """The sampling settings used: the given ones, or the model's recommended ones where None."""
    return {name: sampler.defaults[name] if value is None else value for name, value in given.items()}


def check_sampler(sampler: Sampler) -> None:
    """Raises ValueError unless the sampler draws the ten digits at a size the judge supports."""
    if sampler.num_classes != CLASSES:
        raise ValueError(f"sampler must have {CLASSES} classes to draw digits, got {sampler.num_classes}")
    if sampler.image_size < SCAN:
        raise ValueError(
            f"sampler must draw images of at least {SCAN}x{SCAN} pixels, got {sampler.image_size}"
        )


def draw(
    sampler: Sampler,
    images_per_class: int,
    seed: int,
    *,
    batch_size: int = 50,
    progress: bool = False,
    **settings: Any,
) -> Labelled:
    """Samples of every class, each with its own seed: seed, seed + 1, ...

    Returns:
        10 * images_per_class grey images and the requested classes.
    """
    labels = torch.arange(CLASSES).repeat_interleave(images_per_class)
    seeds = torch.arange(seed, seed + len(labels))
    drawn = []
    starts = range(0, len(labels), batch_size)
    for start in tqdm(starts, desc="sampling", unit="batch", disable=not progress):
        part = slice(start, start + batch_size)
        images = sampler(labels[part].tolist(), seeds[part].tolist(), **settings)  # (b, 3, S, S)
        want = (len(labels[part]), 3, sampler.image_size, sampler.image_size)
        if tuple(images.shape) != want:
            raise ValueError(f"sampler must return images of shape {want}, got {tuple(images.shape)}")
        drawn.append(grey(images.cpu()))
    return Labelled(torch.cat(drawn), labels)


@torch.no_grad()
def reconstruct(sampler: Sampler, items: Labelled, batch_size: int = 50) -> Labelled:
    """The tokenizer's reconstructions of grey images."""
    parts: list[Tensor] = []
    for images in items.images.split(batch_size):
        x = (images * 2 - 1)[:, None].expand(-1, 3, -1, -1).to(sampler.device)  # (b, 3, S, S) in [-1, 1]
        back = cast(Tensor, sampler.vae.img_to_reconstructed_img(x, last_one=True))
        parts.append(grey((back.float().cpu() + 1) / 2))
    return Labelled(torch.cat(parts), items.labels)


def compare_frechet(
    judge: DigitsJudge, samples: Labelled, coded: Labelled, draws: int, generator: torch.Generator
) -> FrechetTable:
    """All Fréchet distances of a report; `coded` are the reconstructions of judge.real, in its order."""
    distances: dict[str, list[float]] = {"halves": [], "samples": [], "train": [], "coded": []}
    # Splits indices, so that images and reconstructions are split alike.
    index = Labelled(torch.arange(len(judge.real)), judge.real.labels)
    for _ in range(draws):
        first, second = halves(index, generator)
        half = judge.real.take(second.images)
        distances["halves"].append(judge.frechet(judge.real.take(first.images), half))
        distances["coded"].append(judge.frechet(coded.take(first.images), half))
        distances["samples"].append(judge.frechet(draw_like(samples, half, generator), half))
        distances["train"].append(judge.frechet(draw_like(judge.train, half, generator), half))
    means = {name: fmean(values) for name, values in distances.items()}
    return FrechetTable(
        samples=judge.frechet(samples, judge.real),
        train=judge.frechet(judge.train, judge.real),
        reconstructions=judge.frechet(coded, judge.real),
        half_size=len(half),
        draws=draws,
        halves=means["halves"],
        halves_sd=stdev(distances["halves"]),
        samples_half=means["samples"],
        train_half=means["train"],
        reconstructions_half=means["coded"],
    )


def compare_neighbours(of_samples: Tensor, of_real: Tensor) -> NeighbourTable:
    """Summary of the distances to the nearest training image: samples (N,), real images (M,)."""
    threshold = float(of_real.quantile(0.01))
    return NeighbourTable(
        samples_median=float(of_samples.median()),
        real_median=float(of_real.median()),
        threshold=threshold,
        near=float((of_samples < threshold).double().mean()),
    )


def search_copies(
    judge: DigitsJudge,
    samples: Labelled,
    coded_real: Labelled,
    coded_train: Labelled,
    augmented_train: Iterable[Labelled],
) -> tuple[NeighbourTable, NeighbourTable, NeighbourTable]:
    """Neighbours among training images; among these and augmented ones; and with all reconstructed by the tokenizer.

    The two extra comparisons catch copies of augmented images, and copies that are only as exact as the
    tokenizer's reconstruction.
    """
    plain, plain_real = judge.nearest(samples, judge.train), judge.nearest(judge.real, judge.train)
    augmented, augmented_real = plain, plain_real
    for others in augmented_train:
        augmented = augmented.minimum(judge.nearest(samples, others, exact=False))
        augmented_real = augmented_real.minimum(judge.nearest(judge.real, others, exact=False))
    coded, coded_of_real = judge.nearest(samples, coded_train), judge.nearest(coded_real, coded_train)
    return (
        compare_neighbours(plain, plain_real),
        compare_neighbours(augmented, augmented_real),
        compare_neighbours(coded, coded_of_real),
    )


def evaluate_digits(
    sampler: Sampler,
    *,
    images_per_class: int = 100,
    seed: int = 0,
    split: str = "test",
    cfg: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    augment: float = 1.0,
    copies: int = 20,
    augment_seed: int = 0,
    batch_size: int = 50,
    draws: int = 20,
    progress: bool = False,
    judge: DigitsJudge | None = None,
) -> DigitsReport:
    """Measures the quality of a sampler of the ten digits against real ones.

    Three questions: a classifier trained on the real training split tells whether a sample is the requested
    digit; the Fréchet distance, whether samples are distributed like real images; the nearest training image
    and the spread within a class, whether they are copies or all the same.

    Args:
        sampler: a model of 10 classes.
        images_per_class: samples of each class, at least half the real split's count of any class.
        seed: sample i has seed + i; it seeds the random halves too.
        split: real images to compare with, "test" or "val"; the judge learns from "train" only.
        cfg, top_k, top_p: sampling settings; None is the model's recommended value.
        augment, copies, augment_seed: strength, versions of each image and seed of the augmented images that
            the model was trained on, to search them for copies too; by default those of the bundled model.
        batch_size: images drawn at once; samples do not depend on it.
        draws: random splits into halves to average over.
        progress: show a progress bar.
        judge: reuse the judge of an earlier call for this image size and split.

    Raises:
        ValueError: not ten classes, images smaller than 8x8, too few samples, an unknown split, a judge of
            another size or split; scikit-learn is missing (DataError).
    """
    check_sampler(sampler)
    if batch_size < 1 or draws < 2:
        raise ValueError(f"batch_size must be at least 1 and draws at least 2, got {batch_size} and {draws}")
    judge = judge or DigitsJudge(sampler.image_size, split)
    if (want := (sampler.image_size, split)) != (got := (judge.image_size, judge.split)):
        raise ValueError(f"judge must be for image size and split {want}, got {got}")
    needed = int(judge.real.labels.bincount(minlength=CLASSES).max()) // 2
    if images_per_class < needed:
        raise ValueError(
            f"images_per_class must be at least {needed} for split {split!r}, got {images_per_class}"
        )

    settings = settings_of(sampler, cfg=cfg, top_k=top_k, top_p=top_p)
    samples = draw(
        sampler,
        images_per_class,
        seed,
        batch_size=batch_size,
        progress=progress,
        **settings,
    )
    coded_real = reconstruct(sampler, judge.real, batch_size)
    coded_train = reconstruct(sampler, judge.train, batch_size)
    generator = torch.Generator().manual_seed(seed)
    augmented_train = (
        read_split("train", judge.image_size, augment=augment, seed=augment_seed, epoch=epoch)
        for epoch in range(copies)
    )
    plain, augmented, coded = search_copies(judge, samples, coded_real, coded_train, augmented_train)
    right = (judge.predict(samples.images) == samples.labels).double().view(CLASSES, images_per_class)
    return DigitsReport(
        split=split,
        image_size=judge.image_size,
        num_train=len(judge.train),
        num_real=len(judge.real),
        num_samples=len(samples),
        seed=seed,
        sampling=settings,
        accuracy=float(right.mean()),
        class_accuracy=tuple(right.mean(1).tolist()),
        real_accuracy=judge.real_accuracy,
        reconstruction_accuracy=judge.accuracy(coded_real),
        frechet=compare_frechet(judge, samples, coded_real, draws, generator),
        neighbours=plain,
        neighbours_augmented=augmented,
        neighbours_coded=coded,
        samples_spread=judge.spread(samples),
        real_spread=judge.spread(judge.real),
    )
