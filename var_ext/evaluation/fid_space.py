"""What `evaluate_fid` finds in one feature space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from var_ext.evaluation.feature_store import FeatureStore, Field
from var_ext.evaluation.fid_reference import KEPT, Gaussian, gaussians
from var_ext.evaluation.frechet import gaussian_distance
from var_ext.evaluation.image_sources import FolderImages
from var_ext.evaluation.inception_score import CHUNK, SEED, InceptionScore
from var_ext.evaluation.kernel_distance import kernel_distance
from var_ext.evaluation.manifolds import K, distances, precision_recall

ROUNDING = 1e-9  # of the variance: a distance below it is none


@dataclass(frozen=True)
class SpaceFeatures:
    """Features in one space.

    Attributes:
        samples: of what is measured.
        reference: of the reference's images, if it has some.
        real: of other real images, whose distance to the reference is the unit of FDr, if there are some.
        known: statistics of the reference that its file has for this space.
    """

    samples: FeatureStore
    reference: FeatureStore | None
    real: FeatureStore | None
    known: dict[str, Gaussian]


class MeasuredSpace:
    """
    Args:
        features: of one space.
        tag: after the names of what is said of every space, such as " (lite0)".
        device: where distances between features are computed.

    Attributes:
        figures, conventions, warnings: as in `FidReport`.
        facts: of the network and of the reference's statistics.
        ratio: distance of the samples over that of the real images, or None without these.
        scores: Inception Score in file order, and shuffled; None where the space has none.

    Raises:
        ValueError: the real images are no other than the reference's.
    """

    def __init__(
        self, features: SpaceFeatures, *, tag: str, device: torch.device, progress: bool = False
    ) -> None:
        self.store, self.others = features.samples, features.reference
        self.real, self.known = features.real, features.known
        self.extractor, self.tag, self.device, self.progress = self.store.extractor, tag, device, progress
        self.title = self.extractor.titles[self.extractor.main]
        self.figures: dict[str, float] = {}
        self.conventions: dict[str, str] = {}
        self.ratio: float | None = None
        self._describe()
        self._frechet()
        self.scores = self._inception_score()
        if self.others is not None:
            self._compare(Field(self.store, self.extractor.main), self._few(self.others))
        self.warnings = self._warned()

    def _describe(self) -> None:
        extractor = self.extractor
        self.facts: dict[str, Any] = {
            "reference_statistics": bool(self.known),
            "weights": extractor.weights,
            "digest": extractor.digest,
            "precision": extractor.precision,
        }
        self.conventions[f"weights{self.tag}"] = (
            f"{extractor.weights}, sha256 of their values {extractor.digest}"
        )
        self.conventions[f"network{self.tag}"] = (
            f"{extractor.precision}, batches of {self.store.batch_size}; {extractor.resize}"
        )

    def _frechet(self) -> None:
        mine = gaussians(self.store)
        known = self.known
        if not known and self.others is not None:
            known = gaussians(self.others)
        for field, title in self.extractor.titles.items():
            if field in known:
                self.figures[title] = gaussian_distance(*mine[field], *known[field])
        counted = "statistics of the reference file"
        if not self.known and self.others is not None:
            counted = f"statistics of the reference's {len(self.others)} images"
        titles = " and ".join(title for title in self.extractor.titles.values() if title in self.figures)
        self.conventions[titles] = (
            f"unbiased covariances, float64, nothing added to their diagonals; {counted}"
        )
        if self.real is not None:
            main = self.extractor.main
            unit = gaussian_distance(*gaussians(self.real)[main], *known[main])
            if unit <= ROUNDING * float(known[main][1].trace()):
                raise ValueError(
                    f"real images must differ from the reference, got the {self.title} {unit:.3g} of "
                    f"{self.real.images.name}: hold some out, such as a validation set"
                )
            self.figures[f"{self.title} of real images"] = unit
            self.ratio = self.figures[f"FDr ({self.title})"] = self.figures[self.title] / unit

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
        with tqdm(
            total=total, desc=f"distances{suffix}", unit_scale=True, unit="", disable=not self.progress
        ) as bar:
            half, single = (
                precision_recall(mine, theirs, half=half, device=self.device, step=bar.update)
                for half in (True, False)
            )
        self.figures |= {f"precision{suffix}": half.precision, f"recall{suffix}": half.recall}
        self.figures |= {f"precision fp32{suffix}": single.precision, f"recall fp32{suffix}": single.recall}
        self.conventions[f"precision and recall{self.tag}"] = (
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

    def _warned(self) -> list[str]:
        found = [
            f"{name} is left out: the reference file has no statistics for it. Take a file of `var-ext reference`, or "
            "a folder of images"
            for name in self.extractor.titles.values()
            if name not in self.figures
        ]
        if self.extractor.precision != "fp32":
            found.append(
                f"the network computed in {self.extractor.precision}, which moves {self.title} by some tenths of a "
                "percent: take --net-precision fp32 for figures that are compared with published ones"
            )
        if self.others is not None and self.extractor.logits is not None and not self.known:
            found.append(
                f"statistics are of the {len(self.others)} images of {self.others.images.name}, not of a whole data "
                "set as in ADM's files (mu, sigma)"
            )
        return found
