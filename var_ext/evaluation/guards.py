"""What makes figures of samples incomparable: said beside them, each with its remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from var_ext.evaluation.feature_store import DIGEST, FeatureStore
from var_ext.evaluation.image_sources import Images

ENOUGH = 50_000  # images that published figures are of
TOGETHER = 0.5  # share of images followed by one of their class from which on files count as in class order
APART = 1.1  # Inception Score shuffled over that in file order, likewise


def about_images(images: Images, others: Images | None, distance: str) -> list[str]:
    """Sentences on number, size, format and classes of samples.

    Args:
        others: of the reference.
        distance: its name, such as "FID".
    """
    found = []
    if images.count < ENOUGH:
        found.append(
            f"{images.count} images: published figures are of {ENOUGH}, and {distance} is larger for fewer. Compare it "
            f"at equal numbers only, or draw {ENOUGH}"
        )
    if others is not None and images.size != others.size:
        found.append(
            f"samples are of {images.sides}, the reference of {others.sides}: published figures compare equal "
            "sizes. Take the reference of this size"
        )
    if images.lossy:
        found.append(
            f"{images.lossy} of {images.count} files are JPEG, whose artefacts change {distance}: write PNG or .npz"
        )
    if images.labels is not None:
        counts = Counter(images.labels)
        least, most = min(counts.values()), max(counts.values())
        if most > least:
            found.append(
                f"classes are not equally often there, {least} to {most} images each: published figures are of equally "
                "many. Draw as many of each class"
            )
    return found


def about_order(labels: Sequence[int] | None, in_order: float | None, shuffled: float | None) -> list[str]:
    """A sentence where files are in class order, by their labels or, without these, by both Inception Scores."""
    scores = "" if in_order is None else f" ({in_order:.2f}, shuffled {shuffled:.2f})"
    remedy = (
        f"the Inception Score in file order{scores} is of chunks of 5000 images with few classes, far too low. Let "
        "classes take turns, as `var-ext sample --out NAME.npz` does, or quote the shuffled one as such"
    )
    if labels is not None:
        each = np.asarray(labels)
        together = float((each[1:] == each[:-1]).mean()) if len(each) > 1 else 0.0
        if together > TOGETHER and len(set(labels)) > 1:
            return [
                f"images are in class order ({together:.0%} are followed by one of their class): {remedy}"
            ]
    if in_order is not None and shuffled is not None and shuffled > APART * in_order:
        return [f"images seem to be in class order: {remedy}"]
    return []


def about_chunks(count: int, chunk: int) -> list[str]:
    """A sentence where the Inception Score's last chunk is short: it counts as much as the others."""
    short = count % chunk
    if count <= chunk or not short:
        return []
    return [
        f"the Inception Score is a mean over chunks of {chunk}, and the last one of these {count} images has {short}, "
        f"which lowers it: draw a multiple of {chunk}"
    ]


def about_real(samples: Images, real: FeatureStore, others: FeatureStore | None) -> list[str]:
    """Sentences where the distance of real images is no fair unit.

    Args:
        real: features of those images.
        others: of the reference's, where it has some.
    """
    images, found = real.images, []
    if images.count != samples.count:
        found.append(
            f"FDr is of {samples.count} samples and {images.count} real images, and a distance is larger for fewer: "
            "take equally many"
        )
    if images.size != samples.size:
        found.append(
            f"samples are of {samples.sides}, the real images of {images.sides}: FDr compares equal sizes. Crop and "
            "resize these as the reference was"
        )
    if others is not None:
        there = set(map(bytes, _digests(others)))
        twins = sum(bytes(digest) in there for digest in _digests(real))
        if twins:
            found.append(
                f"{twins} of {images.count} real images are in the reference too, which makes the unit of FDr too "
                "small and FDr too large: hold them out"
            )
    return found


def about_duplicates(store: FeatureStore) -> list[str]:
    """A sentence where images equal others to the pixel."""
    digests = _digests(store)
    twins = len(digests) - len(np.unique(digests, axis=0))
    if not twins:
        return []
    return [
        f"{twins} of {len(digests)} images equal another to the pixel, which narrows what is measured: draw with a "
        "seed of its own for each image"
    ]


def _digests(store: FeatureStore) -> np.ndarray:
    """Of the pixels, (N, 2) uint64."""
    return np.concatenate([np.array(rows[DIGEST]) for _, rows in store.rows()])
