"""Figures by class in a feature space: does an image show the class that was asked for, and how varied is a class?"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-3  # added to the covariance, over its mean variance: features that hardly vary decide nothing


class LinearProbe:
    """A linear classifier on fixed features: ridge regression on the classes, each weighed alike, in closed form.

    Fitted to real images it is independent of the model whose samples it judges, and its share of right answers on
    held-out images says what a share on samples is worth.

    Args:
        features: (N, D), of training images.
        labels: (N,) int64.
        classes: how many there are, K; each must have an image.

    Raises:
        ValueError: a class has no image, a label is out of range, or a feature is not finite.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        counts = _counts(features, labels, classes)
        if not counts.all():
            lacking = (counts == 0).nonzero().flatten().tolist()
            raise ValueError(
                f"a probe needs training images of all {classes} classes, got none of {lacking[:8]}"
            )
        x = features.double()
        weight = (1 / counts.double())[labels][:, None] / classes  # (N, 1): sums to 1
        self.mean = (weight * x).sum(0)
        x = x - self.mean
        covariance = x.T @ (weight * x)
        covariance.diagonal().add_(RIDGE * covariance.diagonal().mean().clamp_min(1e-300))
        target = torch.nn.functional.one_hot(labels, classes).double() - 1 / classes
        self.weight = torch.linalg.solve(covariance, x.T @ (weight * target))  # (D, K)

    def predict(self, features: Tensor) -> Tensor:
        """The most likely class of each: (N, D) -> (N,) int64."""
        return ((features.double() - self.mean) @ self.weight).argmax(1)

    def accuracy(self, features: Tensor, labels: Tensor) -> list[float]:
        """Share of right answers by class, (K,); NaN for a class without images."""
        classes = self.weight.shape[1]
        counts = _counts(features, labels, classes)
        right = torch.bincount(labels[self.predict(features) == labels], minlength=classes)
        return (right.double() / counts.double()).tolist()


def spread(features: Tensor, labels: Tensor, classes: int) -> list[float]:
    """Mean squared L2 distance of two different images of a class, (K,); NaN for a class with fewer than two.

    Args:
        features: (N, D).
        labels: (N,) int64.

    Raises:
        ValueError: a label is out of range, or a feature is not finite.
    """
    _counts(features, labels, classes)
    # 2 / (n (n - 1)) sum_{i<j} |x_i - x_j|^2 = 2 n / (n - 1) (mean |x|^2 - |mean x|^2), about the class's own mean
    found = []
    for label in range(classes):
        mine = features[labels == label].double()
        found.append(float(2 * mine.var(0, correction=1).sum()) if len(mine) > 1 else float("nan"))
    return found


def _counts(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features must be (N, D) and labels (N,), got {tuple(features.shape)} and {tuple(labels.shape)}"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels must be in 0..{classes - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
    if not torch.isfinite(features).all():
        raise ValueError("features must be finite, got NaN or infinity")
    return torch.bincount(labels, minlength=classes)
