"""`evaluate_fid`: FID, sFID, Inception Score, precision, recall and kernel distance of samples to a reference, in one
feature space or several, and FDr, the mean over spaces in units of what real images have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from var_ext.data import DataError
from var_ext.evaluation import guards
from var_ext.evaluation.feature_store import BATCH, PATIENCE, FeatureStore, fill
from var_ext.evaluation.features import Extractor
from var_ext.evaluation.fid_reference import STATISTICS, Gaussian, Reference, check_covariance
from var_ext.evaluation.fid_report import FidReport
from var_ext.evaluation.fid_space import MeasuredSpace, SpaceFeatures
from var_ext.evaluation.image_sources import DrawnImages, Images
from var_ext.evaluation.inception_score import CHUNK
from var_ext.evaluation.manifolds import K
from var_ext.export import rank_and_world
from var_ext.training.precision import tf32


def evaluate_fid(
    samples: Images,
    reference: Reference,
    extractors: Extractor | Sequence[Extractor],
    *,
    real: Images | None = None,
    cache: Path | None = None,
    batch_size: int = BATCH,
    device: str | torch.device = "cpu",
    progress: bool = False,
    patience: float = PATIENCE,
) -> FidReport | None:
    """Measures samples as ADM's evaluator does (arXiv 2105.05233; its conventions are in the report).

    Memory holds two blocks of images, 10,000 x 2 features and a few covariances, however many images there are; pixels
    are read, or drawn, once for all spaces.

    Args:
        samples: of one size; see `image_sources`.
        reference: see `read_reference`; its statistics serve Inception's space alone.
        extractors: one space or several, see `features`.
        real: real images that are not the reference's, as many as samples. Their Fréchet distance to the reference is
            then the unit: FDr of a space is the samples' distance over theirs, FDr the mean over two spaces or more
            (arXiv 2604.28190: over six, with the 50,000 validation images of ImageNet). No mean of bare distances is
            given: they differ a thousandfold between spaces.
        cache: folder of features: a run that was stopped goes on from it, and ranks share it. None: none are kept.
        batch_size: images computed at once; figures do not depend on it but for rounding.
        device: where distances between features are computed.
        patience: seconds without news of another rank after which it is lost.

    Returns:
        The report; None on ranks other than 0.

    Raises:
        DataError: images cannot be read, or the reference has statistics of another network.
        CheckpointError: features cannot be written, or a rank is lost.
        ValueError: no space, or two of one name; fewer than two images, or real ones that are those of the reference;
            features that are not finite; ranks without `cache`.
    """
    rank, world = rank_and_world()
    if cache is None and world > 1:
        raise ValueError(
            f"{world} ranks must share a folder of features, got none: name one with --cache or --json"
        )
    spaces = (extractors,) if isinstance(extractors, Extractor) else tuple(extractors)
    _check_names(spaces)
    known = [_fitting(reference, extractor) for extractor in spaces]
    _check_counts(samples, reference)
    if real is not None:
        _check_real(real, reference)
    with ExitStack() as stack:
        folder = cache or Path(stack.enter_context(TemporaryDirectory()))

        def filled(images: Images, what: str) -> list[FeatureStore]:
            stores = [FeatureStore(folder, images, extractor, batch_size=batch_size) for extractor in spaces]
            fill(stores, what, progress=progress, patience=patience)
            return stores

        mine = filled(samples, "features")
        others: Sequence[FeatureStore | None] = [None] * len(spaces)
        theirs: Sequence[FeatureStore | None] = [None] * len(spaces)
        if reference.images is not None:
            others = filled(reference.images, "features of the reference")
        if real is not None:
            theirs = filled(real, "features of real images")
        if rank:
            return None
        with tf32(False):
            measured = [
                MeasuredSpace(
                    SpaceFeatures(*each),
                    tag=each[0].extractor.suffix if len(spaces) > 1 else "",
                    device=torch.device(device),
                    progress=progress,
                )
                for each in zip(mine, others, theirs, known, strict=True)
            ]
        return _report(measured, reference, real)


def _check_names(spaces: Sequence[Extractor]) -> None:
    """Refuse spaces whose figures could not be told apart."""
    if not spaces:
        raise ValueError("there must be a feature space, got none")
    titles = Counter(title for extractor in spaces for title in extractor.titles.values())
    twice = [title for title, count in titles.items() if count > 1]
    if twice:
        raise ValueError(f"feature spaces must have distances of different names, got {twice[0]} twice")


def _fitting(reference: Reference, extractor: Extractor) -> dict[str, Gaussian]:
    """The statistics of a reference that serve an extractor."""
    if set(extractor.fields) != set(STATISTICS):
        if reference.images is None:
            raise DataError(
                f"{reference.name} has statistics of Inception alone, which say nothing in another space: take a "
                "reference with images (arr_0), or a folder"
            )
        return {}
    for field, (mean, _) in reference.statistics.items():
        if len(mean) != extractor.fields[field]:
            raise DataError(
                f"{STATISTICS[field][0]} of {reference.name} must have {extractor.fields[field]} features, as "
                f"Inception's, got {len(mean)}: it is of another network"
            )
    return reference.statistics


def _check_counts(samples: Images, reference: Reference) -> None:
    """Refuse too few images before hours of features."""
    if reference.images is None:
        check_covariance(samples)
        return
    for images in (samples, reference.images):
        if images.count <= K:
            raise ValueError(
                f"precision and recall of k = {K} need at least {K + 1} images of both kinds, got {images.count} of "
                f"{images.name}"
            )


def _check_real(real: Images, reference: Reference) -> None:
    check_covariance(real)
    if reference.images is not None and real.key == reference.images.key:
        raise ValueError(
            f"real images must be others than those of the reference, whose distance is 0, got {real.name} for both: "
            "hold some out, such as a validation set"
        )


def _report(measured: Sequence[MeasuredSpace], reference: Reference, real: Images | None) -> FidReport:
    """What was found in all spaces, and of all together."""
    first = measured[0]
    samples, others, several = first.store.images, reference.images, len(measured) > 1
    conventions, facts = _described(samples, reference, real)
    facts["batch_size"] = first.store.batch_size
    figures: dict[str, float] = {}
    found = guards.about_images(samples, others, "a distance" if several else first.title)
    for each in measured:
        figures |= each.figures
        conventions |= each.conventions
    scored = [each.scores for each in measured if each.scores[0] is not None]
    found += guards.about_order(samples.labels, *(scored[0] if scored else (None, None)))
    if scored:
        found += guards.about_chunks(samples.count, CHUNK)
    facts |= {"spaces": {each.title: each.facts for each in measured}} if several else first.facts
    if first.real is not None:
        found += guards.about_real(samples, first.real, first.others)
        conventions |= _ratios(figures, measured, first.real.images)
    found += guards.about_duplicates(first.store)
    for each in measured:
        found += each.warnings
    if others is None:
        found.append(
            f"{reference.name} has no images: precision, recall and kernel distance need some. Take ADM's file, which "
            "has arr_0, or write one with `var-ext reference`"
        )
    return FidReport(figures, conventions, tuple(found), facts)


def _ratios(figures: dict[str, float], measured: Sequence[MeasuredSpace], real: Images) -> dict[str, str]:
    """Adds the mean of the ratios of two spaces or more; returns the convention."""
    text = (
        f"distance of the samples over that of the {real.count} images of {real.name}, both to the reference"
    )
    ratios = [each.ratio for each in measured if each.ratio is not None]
    if len(ratios) > 1:
        figures["FDr"] = sum(ratios) / len(ratios)
        text += f"; mean over {len(ratios)} spaces, {', '.join(each.title for each in measured)}"
    return {
        "FDr": f"{text} (arXiv 2604.28190, where it is of Inception, ConvNeXt, DINOv2, MAE, SigLIP and CLIP and of "
        "ImageNet's validation images: compare equal spaces and images only)"
    }


def _described(
    samples: Images, reference: Reference, real: Images | None
) -> tuple[dict[str, str], dict[str, Any]]:
    """Conventions and facts that are those of all spaces."""
    others, classes = reference.images, "classes not known"
    facts: dict[str, Any] = {
        "samples": samples.name,
        "count": samples.count,
        "size": list(samples.size),
        "order": samples.order,
        "reference": reference.name,
        "reference_images": None if others is None else others.count,
    }
    if real is not None:
        facts |= {"real": real.name, "real_images": real.count}
    if samples.labels is not None:
        counts = Counter(samples.labels)
        least, most = min(counts.values()), max(counts.values())
        facts |= {"classes": len(counts), "least_per_class": least, "most_per_class": most}
        each = f"{least}" if least == most else f"{least} to {most}"
        classes = f"{len(counts)} classes, {each} images each"
    drawn = isinstance(samples, DrawnImages)
    conventions = {
        "samples": f"{samples.count} of {samples.name}, {samples.sides}, order: {samples.order}; {classes}",
        "pixels": "255 times the value, cut to uint8" if drawn else "uint8, as they are",
        "reference": reference.name,
    }
    return conventions, facts
