"""What is to be drawn: a request that can be split into batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from var_ext.engine.draw import Edit, Randomness
from var_ext.engine.options import Options


@dataclass(frozen=True)
class Call:
    """N images.

    Attributes:
        labels: (N,) int64, checked.
        randomness: seeds (N,) int64, or a generator for all; None: torch's global one.
        options: scale by scale.
        edit: changes codes before they enter f_hat.
        decode: without it there are tokens and no images.
        conditions: what else the model's `condition` takes, (N, ...) each.
    """

    labels: Tensor
    randomness: Randomness
    options: Options
    edit: Edit | None = None
    decode: bool = True
    conditions: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: slice, device: torch.device) -> Call:
        """Some of the images, on the device. Only a call with seeds can be split: a generator serves one batch."""
        edit: Any = self.edit
        seeds = self.randomness
        assert isinstance(seeds, Tensor)
        return replace(
            self,
            labels=self.labels[rows].to(device),
            randomness=seeds[rows].to(device),
            edit=None if edit is None else edit[rows],
            conditions={name: value[rows].to(device) for name, value in self.conditions.items()},
        )
