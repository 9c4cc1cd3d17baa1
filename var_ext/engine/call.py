"""A sampling request, which can be split into batches."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from var_ext.engine.draw import Edit, Randomness
from var_ext.engine.options import Options

Integers = int | np.integer | Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True)
class Call:
    """N images.

    Attributes:
        labels: (N,) int64, checked.
        randomness: seeds (N,) int64, or a generator for all; None: torch's global one.
        options: per scale.
        edit: changes codes before they enter f_hat.
        decode: if False, only tokens, no images.
        conditions: further arguments of the model's `condition`, (N, ...) each.
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


def as_int64(name: str, values: Integers, *, bits: bool = False) -> Tensor:
    """Integers of Python, NumPy or torch as int64, of the same shape; nothing is rounded.

    Args:
        name: what to call them in an error.
        values: one, a sequence or an array of any shape.
        bits: read unsigned values from 2^63 on as the signed number with the same 64 bits, as torch's generators do.

    Raises:
        ValueError: a value has more than 64 bits (without `bits`: does not fit in int64).
        TypeError: they are not integers.
    """
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # of objects, or too large
        tensor = _of_objects(name, values)
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise TypeError(f"{name} must be integers, got {str(tensor.dtype).removeprefix('torch.')}")
    found = tensor.to(torch.int64)
    if tensor.dtype == torch.uint64 and not bits and bool((found < 0).any()):
        raise ValueError(
            f"{name} must be below 2^63, got {tensor.flatten()[found.flatten() < 0].tolist()[:8]}"
        )
    return found


def _of_objects(name: str, values: Any) -> Tensor:
    """Numbers that torch does not accept, as uint64 where one exceeds int64."""
    array = np.asarray(values, dtype=object)
    try:
        found = [operator.index(value) for value in array.ravel()]
    except TypeError as error:
        raise TypeError(f"{name} must be integers, got {values!r}") from error
    if any(not -(2**63) <= value < 2**64 for value in found):
        raise ValueError(f"{name} must be integers of 64 bits, got {values!r}")
    unsigned = any(value >= 2**63 for value in found)
    wrapped = np.array([value % 2**64 for value in found], dtype=np.uint64).reshape(array.shape)
    return torch.from_numpy(wrapped if unsigned else wrapped.view(np.int64))
