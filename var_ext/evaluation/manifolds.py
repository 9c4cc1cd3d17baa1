"""Precision and recall (arXiv 1904.06991) as ADM's evaluator computes them, in bounded memory.

A set's manifold is the union of balls around its features that reach to the third nearest of the others. Precision is
the share of samples inside the reference's manifold, recall the share of the reference inside the samples'.

ADM computes squared distances |u|^2 - 2 u v + |v|^2 in float16 and, where one of a block of 10,000 x 10,000 is not
finite, that block again in float32. Here products are summed in float32 and rounded to float16 afterwards, as GPUs do;
the order of the last sums is not defined there either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

K = 3
BLOCK = 10_000  # rows and columns that fall back to float32 together
ROWS = 500  # computed at once: 20 MB a matrix


class Rows(Protocol):
    """Features (N, D) of which slices are read when they are needed: a tensor, or something kept in files."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class PrecisionRecall:
    """Both in [0, 1], and how many blocks of distances fell back to float32 (0 where all are)."""

    precision: float
    recall: float
    fallbacks: int = 0


class _Overflow(Exception):
    """A distance is not finite in float16."""


def precision_recall(
    samples: Rows,
    reference: Rows,
    *,
    half: bool,
    k: int = K,
    block: int = BLOCK,
    device: str | torch.device = "cpu",
    step: Callable[[int], object] = lambda done: None,
) -> PrecisionRecall:
    """
    Args:
        samples, reference: (N, D) and (M, D) features.
        half: distances in float16, with ADM's fallback; else all in float32.
        k: of the k-th nearest.
        block: rows and columns of a block.
        step: told after each block how many distances it had; `distances` says how many there are in all.

    Raises:
        ValueError: a set has fewer than k + 1 rows.
    """
    for name, each in (("samples", samples), ("reference", reference)):
        if len(each) <= k:
            raise ValueError(
                f"precision and recall with k = {k} need at least {k + 1} {name}, got {len(each)}"
            )
    work = _Work(half, block, torch.device(device), step)
    radii = work.radii(samples, k)
    radii_reference = work.radii(reference, k)
    inside = torch.zeros(len(samples), dtype=torch.bool)
    covered = torch.zeros(len(reference), dtype=torch.bool)
    for rows, columns in work.blocks(reference, samples):

        def compare(
            at: slice, distance: Tensor, rows: slice = rows, columns: slice = columns
        ) -> tuple[Tensor, Tensor]:
            mine = slice(rows.start + at.start, rows.start + at.stop)
            return (
                (distance <= radii[columns].to(distance.device)).any(1).cpu(),
                (distance <= radii_reference[mine, None].to(distance.device)).any(0).cpu(),
            )

        found = work.each(reference[rows], samples[columns], compare)
        covered[rows] |= torch.cat([first for first, _ in found])
        inside[columns] |= torch.stack([second for _, second in found]).any(0)
    return PrecisionRecall(
        float(inside.double().mean()), float(covered.double().mean()), work.fallbacks if half else 0
    )


def distances(samples: int, reference: int) -> int:
    """How many distances `precision_recall` computes."""
    return samples**2 + reference**2 + samples * reference


class _Work:
    def __init__(self, half: bool, block: int, device: torch.device, step: Callable[[int], object]) -> None:
        self.half, self.block, self.device, self.step, self.fallbacks = half, block, device, step, 0

    def blocks(self, a: Rows, b: Rows) -> Iterator[tuple[slice, slice]]:
        for i in range(0, len(a), self.block):
            for j in range(0, len(b), self.block):
                yield slice(i, min(i + self.block, len(a))), slice(j, min(j + self.block, len(b)))

    def each(
        self, u: Tensor, v: Tensor, use: Callable[[slice, Tensor], tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """`use` of the squared distances of some rows of a block at a time, float32."""
        try:
            found = self._each(u, v, use, self.half)
        except _Overflow:
            self.fallbacks += 1
            found = self._each(u, v, use, False)
        self.step(len(u) * len(v))
        return found

    def _each(
        self, u: Tensor, v: Tensor, use: Callable[[slice, Tensor], tuple[Tensor, Tensor]], half: bool
    ) -> list[tuple[Tensor, Tensor]]:
        u, v = u.to(self.device).float(), v.to(self.device).float()
        if half:
            u, v = u.half().float(), v.half().float()
        norm_u, norm_v = (_norms(x, half) for x in (u, v))
        found = []
        for start in range(0, len(u), ROWS):
            at = slice(start, min(start + ROWS, len(u)))
            product = u[at] @ v.T
            if half:
                squared = norm_u[at, None] - 2 * product.half() + norm_v
                if not torch.isfinite(squared).all():
                    raise _Overflow
            else:
                squared = norm_u[at, None] - 2 * product + norm_v
            found.append(use(at, squared.clamp_min(0).float()))
        return found

    def radii(self, features: Rows, k: int) -> Tensor:
        """(N,) float32: the squared distance of the k-th nearest other, or one nearer where some are equal."""
        nearest = torch.full((len(features), k + 1), torch.inf)
        for rows, columns in self.blocks(features, features):

            def least(at: slice, distance: Tensor) -> tuple[Tensor, Tensor]:
                few = distance.topk(min(k + 1, distance.shape[1]), largest=False).values.cpu()
                return few, few

            found = self.each(features[rows], features[columns], least)
            both = torch.cat([nearest[rows], torch.cat([few for few, _ in found])], 1)
            nearest[rows] = both.topk(k + 1, largest=False).values
        return nearest.amax(1)


def _norms(x: Tensor, half: bool) -> Tensor:
    """(N, D) -> (N,) squared lengths; in float16 each square is rounded, and the sum."""
    return x.half().square().float().sum(1).half() if half else x.square().sum(1)
