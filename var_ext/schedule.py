"""The scales of a VAR: how many tokens each has, and their positions in the sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


@dataclass(frozen=True)
class ScaleSchedule:
    """Token maps from coarse to fine; scale k is a grid of `patch_nums[k]` x `patch_nums[k]` tokens.

    Every layer takes its offsets from here. `K` below is the number of scales, `L` the number of tokens.

    Args:
        patch_nums: side of each token map, at least 1 and never shrinking.

    Raises:
        ValueError: if there is no scale, a side is below 1, or a side is smaller than the one before it.
    """

    patch_nums: tuple[int, ...]

    def __init__(self, patch_nums: Iterable[int]) -> None:
        sides = tuple(int(side) for side in patch_nums)
        if not sides or min(sides) < 1 or any(a > b for a, b in pairwise(sides)):
            raise ValueError(f"patch_nums must be one or more sides >= 1 in ascending order, got {sides}")
        object.__setattr__(self, "patch_nums", sides)

    def __len__(self) -> int:
        return len(self.patch_nums)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale, (K,)."""
        return tuple(side * side for side in self.patch_nums)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First token of each scale, (K,)."""
        return (0, *accumulate(self.lengths[:-1]))

    @cached_property
    def num_tokens(self) -> int:
        """L, the total number of tokens."""
        return sum(self.lengths)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """The slice of each scale in a sequence of L tokens, (K,)."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.lengths, strict=True))

    @property
    def side(self) -> int:
        """Side of the finest token map: the side of the feature grid."""
        return self.patch_nums[-1]

    def ratio(self, k: int) -> float:
        """Progress of scale k from 0 (coarsest) to 1 (finest); it determines guidance and phi."""
        return k / (len(self) - 1) if len(self) > 1 else 0.0

    def prefix(self, num_tokens: int) -> ScaleSchedule:
        """The first scales, those that fill exactly `num_tokens` tokens.

        Raises:
            ValueError: if `num_tokens` is not where a scale ends.
        """
        ends = [s.stop for s in self.slices]
        if num_tokens not in ends:
            raise ValueError(f"a prefix of {self} must have one of {ends} tokens, got {num_tokens}")
        return ScaleSchedule(self.patch_nums[: ends.index(num_tokens) + 1])
