"""Sampling options, per scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from var_ext.schedule import ScaleSchedule


@dataclass(frozen=True)
class Options:
    """One value for each of the K scales of `schedule`.

    cfg: guidance t, logits = (1 + t) cond - t uncond; temperature: logits are divided by it after guidance; top_k,
    top_p: see `ops.sample_tokens`; more_smooth: codes are mixed by a Gumbel-softmax instead of drawn.
    """

    schedule: ScaleSchedule
    cfg: tuple[float, ...]
    top_k: tuple[int, ...]
    top_p: tuple[float, ...]
    temperature: tuple[float, ...]
    more_smooth: bool = False

    @property
    def guided_scales(self) -> int:
        """Number of first scales that compute the unconditional half: up to the last one with guidance."""
        return max((k + 1 for k, t in enumerate(self.cfg) if t != 0), default=0)


def options_for(
    schedule: ScaleSchedule,
    *,
    cfg: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 0.0,
    temperature: float | Sequence[float] = 1.0,
    cfg_until: int | None = None,
    more_smooth: bool = False,
) -> Options:
    """Expands single values to all scales.

    Args:
        schedule: the model's, K scales.
        cfg: one value is the published ramp, cfg * k / (K - 1) at scale k; K values are taken as they are.
        top_k, top_p, temperature: one value for all scales, or K.
        cfg_until: no guidance from this scale on, and no work for its unconditional half; None: on all.
        more_smooth: see `Options`.

    Raises:
        ValueError: a list does not have K values, or a value is out of range.
        TypeError: a value is not a number.
    """
    count = len(schedule)
    cfg, top_k, top_p, temperature = (_plain(value) for value in (cfg, top_k, top_p, temperature))
    ramp = _spread("cfg", cfg, count)
    if not all(map(math.isfinite, ramp)):
        raise ValueError(f"cfg must be finite, got {cfg}")
    if not isinstance(cfg, Sequence):
        ramp = [t * schedule.ratio(k) for k, t in enumerate(ramp)]
    if cfg_until is not None:
        if not isinstance(cfg_until, int | np.integer) or not 0 <= cfg_until <= count:
            raise ValueError(f"cfg_until must be in 0..{count}, the number of scales, got {cfg_until}")
        ramp[cfg_until:] = [0.0] * (count - cfg_until)
    kept = _spread("top_k", top_k, count)
    if not all(math.isfinite(k) and k >= 0 and k == int(k) for k in kept):
        raise ValueError(f"top_k must be whole numbers of 0 or more, got {top_k}")
    shares = _spread("top_p", top_p, count)
    if any(not 0 <= p <= 1 for p in shares):
        raise ValueError(f"top_p must be in [0, 1], got {top_p}")
    heats = _spread("temperature", temperature, count)
    if any(not heat > 0 for heat in heats):
        raise ValueError(
            f"temperature must be above 0, got {temperature}; top_k = 1 takes the most likely token"
        )
    return Options(
        schedule, tuple(ramp), tuple(map(int, kept)), tuple(shares), tuple(heats), bool(more_smooth)
    )


def _plain(value: Any) -> Any:
    """NumPy and torch numbers and arrays as Python ones."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray | Tensor) else value


def _spread(name: str, value: Any, count: int) -> list[float]:
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} must be one value or one for each of the {count} scales, got {len(values)}")
    try:
        return [float(v) for v in values]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number or a list of numbers, got {value!r}") from error
