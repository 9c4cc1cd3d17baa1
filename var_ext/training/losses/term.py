"""A loss as a part: what it measures, how much it weighs, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

Loss = Callable[
    [Tensor, Tensor], Tensor
]  # (output, images), (B, 3, S, S) in [-1, 1] -> () or one an image, (B,)


def ramp(progress: float, start: float, warmup: float) -> float:
    """Factor on a weight at a share of the steps: 0 before `start`, then rising over `warmup` to 1."""
    since = progress - start
    return max(0.0, min(1.0, since / warmup)) if warmup else float(since >= 0)


@dataclass(frozen=True)
class Term:
    """A loss with its weight, from `start` on, which rises over `warmup`; both are shares of the steps."""

    name: str
    weight: float
    start: float = 0.0
    warmup: float = 0.0

    def weight_at(self, progress: float) -> float:
        """Weight at a share of the steps, in [0, 1]."""
        return self.weight * ramp(progress, self.start, self.warmup)

    @property
    def changes(self) -> bool:
        """Whether the weight depends on the step."""
        return self.weight > 0 and (self.start > 0 or self.warmup > 0)


class ImageLosses:
    """Weighted sum of losses between reconstructions and images; one whose weight is 0 is not computed."""

    def __init__(self, parts: Sequence[tuple[Term, Loss]]) -> None:
        self.parts = list(parts)

    def loss(self, name: str) -> Loss | None:
        """The loss of a name, None if there is none."""
        return next((loss for term, loss in self.parts if term.name == name), None)

    def __call__(
        self, output: Tensor, images: Tensor, progress: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            output, images: (B, 3, S, S) float32 in [-1, 1].
            progress: share of the steps that are done.

        Returns:
            The weighted sum, (), and each loss that counts by its name, (), detached and not weighted.
        """
        total, values = None, {}
        for term, loss in self.parts:
            weight = term.weight_at(progress)
            if weight > 0:
                value = loss(output, images).mean()
                total = weight * value if total is None else total + weight * value
                values[term.name] = value.detach()
        return (0 * output.mean() if total is None else total), values
