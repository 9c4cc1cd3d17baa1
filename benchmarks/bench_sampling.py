"""End to end: images per second of the bundled model in fp32, where both backends draw the same pictures."""

from __future__ import annotations

from collections.abc import Callable

from harness.case import Case
from torch import Tensor

import var_ext
from var_ext import backend

SHAPES = {
    **{f"batch {batch}": dict(batch=batch) for batch in (1, 10, 64)},
    "the demo: 80 images, 64 at once": dict(batch=80),
}
SMOKE = dict(batch=1)


def case(batch: int) -> Case:
    sampler = var_ext.load("digits", precision="fp32")
    labels, seeds = [i % sampler.num_classes for i in range(batch)], list(range(batch))

    def drawn(choice: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with backend.force(choice):
                return sampler(labels, seeds)  # (B, 3, H, W)

        return call

    return Case(
        {"var_ext": drawn("native"), "reference": drawn("reference")},
        check=same_pictures,
        images=batch,
        laps=3,
        lap=1.0,
    )


def same_pictures(result: Tensor, expected: Tensor) -> None:
    """Both backends draw the same tokens, up to draws that fall on a rounding error: most pictures agree."""
    agree = (result - expected).abs().amax(dim=(1, 2, 3)) < 1e-2
    assert agree.double().mean() >= 0.9, f"only {int(agree.sum())} of {len(agree)} pictures agree"
