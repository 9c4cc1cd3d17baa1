"""`evaluate_fid`: FID, sFID, Inception Score, precision, recall and kernel distance of samples to a reference."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from var_ext.data import DataError
from var_ext.evaluation import guards
from var_ext.evaluation.feature_store import BATCH, PATIENCE, FeatureStore, Field
from var_ext.evaluation.features import Extractor
from var_ext.evaluation.fid_reference import (
    KEPT,
    STATISTICS,
    Gaussian,
    Reference,
    check_covariance,
    gaussians,
)
from var_ext.evaluation.fid_report import FidReport
from var_ext.evaluation.frechet import gaussian_distance
from var_ext.evaluation.image_sources import DrawnImages, FolderImages, Images
from var_ext.evaluation.inception_score import CHUNK, SEED, InceptionScore
from var_ext.evaluation.kernel_distance import kernel_distance
from var_ext.evaluation.manifolds import K, distances, precision_recall
from var_ext.export import rank_and_world
from var_ext.training.precision import tf32


def evaluate_fid(
    samples: Images,
    reference: Reference,
    extractor: Extractor,
    *,
    cache: Path | None = None,
    batch_size: int = BATCH,
    device: str | torch.device = "cpu",
    progress: bool = False,
    patience: float = PATIENCE,
) -> FidReport | None:
    """Measures samples as ADM's evaluator does (arXiv 2105.05233; its conventions are in the report).

    Memory holds two blocks of images, 10,000 x 2 features and a few covariances, however many images there are.

    Args:
        samples: of one size; see `image_sources`.
        reference: see `read_reference`; its statistics serve Inception's space alone.
        extractor: see `features`.
        cache: folder of features: a run that was stopped goes on from it, and ranks share it. None: none are kept.
        batch_size: images computed at once; figures do not depend on it but for rounding.
        device: where distances between features are computed.
        patience: seconds without news of another rank after which it is lost.

    Returns:
        The report; None on ranks other than 0.

    Raises:
        DataError: images cannot be read, or the reference has statistics of another network.
        CheckpointError: features cannot be written, or a rank is lost.
        ValueError: fewer than two images, features that are not finite, or ranks without `cache`.
    """
    rank, world = rank_and_world()
    if cache is None and world > 1:
        raise ValueError(
            f"{world} ranks must share a folder of features, got none: name one with --cache or --json"
        )
    known = _fitting(reference, extractor)
    _check_counts(samples, reference)
    with ExitStack() as stack:
        folder = cache or Path(stack.enter_context(TemporaryDirectory()))
        store = FeatureStore(folder, samples, extractor, batch_size=batch_size)
        store.fill("features", progress=progress, patience=patience)
        others = None
        if reference.images is not None:
            others = FeatureStore(folder, reference.images, extractor, batch_size=batch_size)
            others.fill("features of the reference", progress=progress, patience=patience)
        if rank:
            return None
        with tf32(False):
            return _Measured(store, reference, known, others, torch.device(device), progress).report()


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


class _Measured:
    """Features of samples and of a reference, and what is found of them."""

    def __init__(
        self,
        store: FeatureStore,
        reference: Reference,
        known: dict[str, Gaussian],
        others: FeatureStore | None,
        device: torch.device,
        progress: bool,
    ) -> None:
        self.store, self.reference, self.known, self.others = store, reference, known, others
        self.device, self.progress, self.extractor = device, progress, store.extractor
        self.figures: dict[str, float] = {}
        self.conventions: dict[str, str] = {}
        self.facts: dict[str, Any] = {}

    def report(self) -> FidReport:
        samples, extractor = self.store.images, self.extractor
        title = extractor.titles[extractor.main]
        self._describe()
        self._frechet()
        scores = self._inception_score()
        if self.others is not None:
            self._compare(Field(self.store, extractor.main), self._few(self.others))
        found = guards.about_images(samples, self.reference.images, title)
        found += guards.about_order(samples.labels, *scores)
        if scores[0] is not None:
            found += guards.about_chunks(len(self.store), CHUNK)
        found += [
            f"{name} is left out: the reference file has no statistics for it. Take a file of `var-ext reference`, or "
            "a folder of images"
            for name in self.extractor.titles.values()
            if name not in self.figures
        ]
        found += guards.about_duplicates(self.store)
        if extractor.precision != "fp32":
            found.append(
                f"the network computed in {extractor.precision}, which moves {title} by some tenths of a percent: take "
                "--net-precision fp32 for figures that are compared with published ones"
            )
        if self.others is None:
            found.append(
                f"{self.reference.name} has no images: precision, recall and kernel distance need some. Take ADM's "
                "file, which has arr_0, or write one with `var-ext reference`"
            )
        elif extractor.logits is not None and not self.known:
            found.append(
                f"statistics are of the {self.others.images.count} images of {self.reference.name}, not of a whole "
                "data set as in ADM's files (mu, sigma)"
            )
        return FidReport(self.figures, self.conventions, tuple(found), self.facts)

    def _describe(self) -> None:
        samples, extractor, say = self.store.images, self.extractor, self.conventions
        classes = "classes not known"
        self.facts = {
            "samples": samples.name,
            "count": samples.count,
            "size": list(samples.size),
            "order": samples.order,
            "reference": self.reference.name,
            "reference_images": None if self.others is None else len(self.others),
            "reference_statistics": bool(self.known),
            "weights": extractor.weights,
            "digest": extractor.digest,
            "precision": extractor.precision,
            "batch_size": self.store.batch_size,
        }
        if samples.labels is not None:
            counts = Counter(samples.labels)
            least, most = min(counts.values()), max(counts.values())
            self.facts |= {"classes": len(counts), "least_per_class": least, "most_per_class": most}
            each = f"{least}" if least == most else f"{least} to {most}"
            classes = f"{len(counts)} classes, {each} images each"
        drawn = isinstance(samples, DrawnImages)
        say["samples"] = (
            f"{samples.count} of {samples.name}, {samples.size[1]} x {samples.size[0]}, order: {samples.order}; "
            f"{classes}"
        )
        say["pixels"] = "255 times the value, cut to uint8" if drawn else "uint8, as they are"
        say["reference"] = self.reference.name
        say["weights"] = f"{extractor.weights}, sha256 of their values {extractor.digest}"
        say["network"] = f"{extractor.precision}, batches of {self.store.batch_size}; {extractor.resize}"

    def _frechet(self) -> None:
        mine = gaussians(self.store)
        known = self.known
        if not known and self.others is not None:
            known = gaussians(self.others)
        for field, title in self.extractor.titles.items():
            if field in known:
                self.figures[title] = gaussian_distance(*mine[field], *known[field])
        counted = "statistics of the reference file" if self.known else "statistics of the reference's images"
        titles = " and ".join(title for title in self.extractor.titles.values() if title in self.figures)
        self.conventions[titles] = (
            f"unbiased covariances, float64, nothing added to their diagonals; {counted}"
        )

    def _inception_score(self) -> tuple[float | None, float | None]:
        if self.extractor.logits is None:
            return None, None
        count = len(self.store)
        both = InceptionScore(count), InceptionScore(count, shuffle=SEED)
        for block, rows in self.store.rows():
            logits = self.extractor.logits(torch.tensor(rows[self.extractor.main]))
            for each in both:
                each.add(block.start, logits)
        in_order, shuffled = (each.value() for each in both)
        self.figures |= {"IS": in_order, "IS shuffled": shuffled}
        self.conventions["IS"] = (
            f"1008 classes, logits without bias, mean over chunks of {CHUNK}; in file order as ADM, and shuffled by "
            f"numpy's RandomState({SEED})"
        )
        return in_order, shuffled

    def _few(self, others: FeatureStore) -> Field:
        """Features of the reference that precision and recall are of: all of a file's, at most 10,000 of a folder's."""
        count = min(KEPT, len(others)) if isinstance(others.images, FolderImages) else None
        return Field(others, self.extractor.main, count)

    def _compare(self, mine: Field, theirs: Field) -> None:
        suffix = self.extractor.suffix
        total = 2 * distances(len(mine), len(theirs))
        with tqdm(total=total, desc="distances", unit_scale=True, unit="", disable=not self.progress) as bar:
            half, single = (
                precision_recall(mine, theirs, half=half, device=self.device, step=bar.update)
                for half in (True, False)
            )
        self.figures |= {f"precision{suffix}": half.precision, f"recall{suffix}": half.recall}
        self.figures |= {f"precision fp32{suffix}": single.precision, f"recall fp32{suffix}": single.recall}
        self.conventions["precision and recall"] = (
            f"k = {K}, squared L2, {len(theirs)} images of the reference; float16 as ADM, {half.fallbacks} blocks of "
            "10,000 x 10,000 not finite and in float32; and all in float32"
        )
        kernel = kernel_distance(
            lambda numbers: mine.take(numbers).to(self.device),
            lambda numbers: theirs.take(numbers).to(self.device),
            (len(mine), len(theirs)),
        )
        name = f"KID{suffix}" if self.extractor.logits is not None else f"KD{suffix}"
        self.figures |= {name: kernel.mean, f"{name} deviation": kernel.deviation}
        self.conventions[name] = (
            f"unbiased, kernel (x y / D + 1)^3, mean and deviation over {kernel.subsets} subsets of {kernel.size}, "
            "drawn as torch-fidelity does"
        )
