"""The judge: real digits, with a classifier and a feature space fitted to their training split."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from var_ext.data import load_dataset
from var_ext.evaluation.frechet import frechet_distance, pixel_distances

CLASSES = 10
SCAN = 8  # the scans inside scikit-learn are 8x8: finer detail in an enlarged image is interpolation
COMPONENTS = 48  # keep 99.8% of the variance of the training pixels


@dataclass(frozen=True)
class Labelled:
    """Grey images and their classes: images (N, S, S) float32 in [0, 1], labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    def take(self, index: Tensor) -> Labelled:
        """The images at `index` (M,)."""
        return Labelled(self.images[index], self.labels[index])


def read_split(
    split: str, image_size: int, *, augment: float = 0.0, seed: int = 0, epoch: int = 0
) -> Labelled:
    """A whole split of the real digits; with augmentation, as a trainer sees it in one epoch."""
    data = load_dataset("digits", split, image_size, augment=augment, seed=seed).with_epoch(epoch)
    images, labels = data.batch(range(len(data)))  # (N, 3, S, S) in [-1, 1], (N,)
    return Labelled(grey((images + 1) / 2), labels)


def grey(images: Tensor) -> Tensor:
    """(N, 3, S, S) in [0, 1] -> (N, S, S) float32: the mean of the channels; the digits have no colour."""
    return images.float().clamp(0, 1).mean(1)


def moved(images: Tensor, down: int, right: int) -> Tensor:
    """(N, S, S) shifted by whole pixels, padded with black."""
    return F.pad(images, (right, -right, down, -down))


class DigitsJudge:
    """Judges digits of one image size. Everything is fitted to the training split.

    Deterministic: a support vector machine and an eigen-decomposition, no random start, no seed.

    Args:
        image_size: side of the images to judge, at least 8.
        split: the real images to compare with, "test" or "val".

    Raises:
        ValueError: the image size or the split is not one of those; scikit-learn is missing (DataError).
    """

    def __init__(self, image_size: int, split: str = "test") -> None:
        if not isinstance(image_size, int) or image_size < SCAN:
            raise ValueError(f"image_size must be an integer of at least {SCAN}, got {image_size!r}")
        if split not in ("test", "val"):
            raise ValueError(f'split must be "test" or "val", got {split!r}')
        self.image_size, self.split = image_size, split
        self.train = read_split("train", image_size)
        self.real = read_split(split, image_size)
        self._fit_classifier()
        self._fit_features()
        self.real_accuracy = self.accuracy(self.real)

    def _fit_classifier(self) -> None:
        """An RBF machine on 8x8 grey levels: 99% on real test images in a fraction of a second.

        It is also trained on each image shifted by half a scan pixel, so as not to depend on exact centring.
        """
        from sklearn.svm import SVC  # installed, as the digits come from it

        step = max(1, self.image_size // (2 * SCAN))
        moves = [(0, 0), (step, 0), (-step, 0), (0, step), (0, -step)]
        images = torch.cat([moved(self.train.images, *move) for move in moves])
        self._classifier = SVC(C=10.0, gamma="scale")
        self._classifier.fit(self._scan(images), self.train.labels.repeat(len(moves)).numpy())

    def _scan(self, images: Tensor) -> np.ndarray:
        """(N, S, S) -> (N, 64): area means on the 8x8 grid of the original scans."""
        return F.adaptive_avg_pool2d(images[:, None], SCAN).flatten(1).double().numpy()

    def _fit_features(self) -> None:
        """Principal axes of the training pixels: fixed by the real data, not by labels or models."""
        x = self.train.images.flatten(1).double()  # (N, S*S)
        self._mean = x.mean(0)
        centred = x - self._mean
        _, vectors = torch.linalg.eigh(centred.T @ centred)
        self._axes = vectors[:, -COMPONENTS:]  # (S*S, D)

    def features(self, images: Tensor) -> Tensor:
        """The fixed feature space of the Fréchet distance.

        48 principal coordinates of the training pixels, and as the 49th the length of the residual: without
        it, noise and blur that no real image has would be projected away and cost nothing.

        Args:
            images: (N, S, S) grey in [0, 1].

        Returns:
            (N, 49) float64, in units of pixel L2.
        """
        centred = images.flatten(1).double() - self._mean
        inside = centred @ self._axes  # (N, D)
        outside = (centred - inside @ self._axes.T).norm(dim=1, keepdim=True)  # (N, 1)
        return torch.cat([inside, outside], dim=1)

    def predict(self, images: Tensor) -> Tensor:
        """Predicted class (N,) int64 of grey images (N, S, S)."""
        return torch.from_numpy(np.asarray(self._classifier.predict(self._scan(images)))).long()

    def margins(self, items: Labelled) -> Tensor:
        """How far the classifier is for an image's label, less how far for the best other class: (N,) float64.

        Above 0 where the label wins. For ranking: no probability, and `predict`, which counts votes, may differ where
        two classes are close.
        """
        votes = torch.from_numpy(np.asarray(self._classifier.decision_function(self._scan(items.images))))
        mine = votes.gather(1, items.labels[:, None])  # (N, 1)
        others = votes.scatter(1, items.labels[:, None], -torch.inf)
        return mine[:, 0] - others.amax(1)

    @property
    def digest(self) -> str:
        """Hex digest of what the classifier learned."""
        learned = (
            self._classifier.support_vectors_,
            self._classifier.dual_coef_,
            self._classifier.intercept_,
        )
        return hashlib.sha256(b"".join(np.ascontiguousarray(each).tobytes() for each in learned)).hexdigest()

    def accuracy(self, items: Labelled) -> float:
        """Share of images whose predicted class is their label."""
        return float((self.predict(items.images) == items.labels).double().mean())

    def frechet(self, a: Labelled, b: Labelled) -> float:
        """Squared Fréchet distance of two sets of images in the fixed feature space."""
        return frechet_distance(self.features(a.images), self.features(b.images))

    def nearest(self, items: Labelled, others: Labelled, *, exact: bool = True) -> Tensor:
        """Pixel L2 from each image to the nearest of others, (N,) float64; exact as in `pixel_distances`."""
        return pixel_distances(items.images, others.images, exact=exact).amin(1)

    def spread(self, items: Labelled) -> float:
        """How much a class varies: mean pixel L2 between two of its images, averaged over the classes."""
        means = []
        for label in items.labels.unique():
            same = items.images[items.labels == label]
            if (n := same.shape[0]) > 1:
                means.append(float(pixel_distances(same, same).sum()) / (n * (n - 1)))
        return fmean(means)


def halves(items: Labelled, generator: torch.Generator) -> tuple[Labelled, Labelled]:
    """Splits a set at random into two halves with the same number of images of each class.

    A class of odd size leaves one image out.
    """
    first, second = [], []
    for label in range(CLASSES):
        index = (items.labels == label).nonzero().flatten()
        index = index[torch.randperm(len(index), generator=generator)]
        half = len(index) // 2
        first.append(index[:half])
        second.append(index[half : 2 * half])
    return items.take(torch.cat(first)), items.take(torch.cat(second))


def draw_like(items: Labelled, like: Labelled, generator: torch.Generator) -> Labelled:
    """Draws from items, without replacement, as many images of each class as `like` has."""
    chosen = []
    for label, count in enumerate(like.labels.bincount(minlength=CLASSES).tolist()):
        index = (items.labels == label).nonzero().flatten()
        if len(index) < count:
            raise ValueError(f"class {label} must have at least {count} images, got {len(index)}")
        chosen.append(index[torch.randperm(len(index), generator=generator)][:count])
    return items.take(torch.cat(chosen))
