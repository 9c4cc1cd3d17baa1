"""Weights of the loss by scale. The published loss weighs all tokens alike, so half of it is the last scale's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from var_ext.schedule import ScaleSchedule

LOGNORMAL = "lognormal"


def parse_weights(given: Sequence[str]) -> tuple[float, ...] | None:
    """Those of the recipe: numbers, the weight of each token of a scale; or "lognormal" alone or nothing: None.

    Raises:
        ValueError: it is none of them, a number is negative or not finite, or all are 0.
    """
    if tuple(given) in ((), (LOGNORMAL,)):
        return None
    try:
        numbers = tuple(map(float, given))
    except ValueError:
        numbers = ()
    if not all(0 <= x < math.inf for x in numbers) or not any(numbers):
        raise ValueError(
            f"loss_weights must be '{LOGNORMAL}' or numbers of at least 0, one a scale and not all 0, such as 1,1,2; "
            f"got {','.join(given)!r}"
        )
    return numbers


def token_weights(given: Sequence[str], schedule: ScaleSchedule) -> Tensor:
    """The weight of every token: (L,) float32, 1 on average.

    "lognormal" is the weighting of HMAR (arXiv 2506.04421; `loss_reweight_type: lognorm` of its code, NVlabs/HMAR
    trainer.py): the share of scale k in the whole loss is proportional to the density of a standard normal at
    (r_j - m) / s, where r are the sides of the scales over the last one's, m and s their mean and standard deviation,
    and j = K + 1 - k counts from the other end; the tokens of a scale divide its share evenly. Its weights add up to 1,
    these to L, which the loss is divided by.

    Raises:
        ValueError: the numbers are not as many as the scales, or "lognormal" has a single scale.
    """
    lengths = torch.tensor(schedule.lengths, dtype=torch.float64)
    numbers = parse_weights(given)
    if not given:
        return torch.ones(schedule.num_tokens)
    if numbers is None:
        sides = torch.tensor(schedule.patch_nums, dtype=torch.float64)
        if len(sides) == 1:
            raise ValueError("loss_weights = lognormal needs two scales or more, got one")
        ratios = sides / sides[-1]
        scores = (ratios.flip(0) - ratios.mean()) / ratios.std()  # of a sample: over K - 1
        weights = torch.exp(-scores.square() / 2) / lengths
    else:
        weights = torch.tensor(numbers, dtype=torch.float64)
        if len(weights) != len(lengths):
            raise ValueError(
                f"loss_weights must have {len(lengths)} numbers, one a scale, got {len(weights)}: {','.join(given)}"
            )
    return (
        (weights * schedule.num_tokens / (weights * lengths).sum()).repeat_interleave(lengths.long()).float()
    )
