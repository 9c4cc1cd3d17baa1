"""Checks of arguments; each message names the op, what was expected and what was given."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import NoReturn

import torch
from torch import Tensor

from var_ext import backend

_DEVICES = (*backend.DEVICES, "meta")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require(condition: bool, op: str, wanted: str, got: object) -> None:
    """Raise ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"{op}: {wanted}, got {got}")


def check_shape(op: str, name: str, tensor: Tensor, letters: str, *sizes: int | None) -> None:
    """`letters` names the axes, as in "(V, C)"; `sizes` gives their lengths, None where any length will do."""
    _check_tensor(op, name, tensor, letters)
    shape = tensor.shape
    if len(shape) == len(sizes):
        for want, have in zip(sizes, shape, strict=True):  # spelt out: a generator would double the cost
            if want is not None and want != have:
                break
        else:
            return
    known = ", ".join("*" if size is None else str(size) for size in sizes)
    raise ValueError(f"{op}: {name} must have shape {letters} = ({known}), got {tuple(shape)}")


def check_last_dim(op: str, name: str, tensor: Tensor, letters: str, size: int) -> None:
    """The last axis must have this length; `letters` names the axes, as in "(..., C)"."""
    _check_tensor(op, name, tensor, letters)
    if tensor.ndim < 1 or tensor.shape[-1] != size:
        raise ValueError(f"{op}: {name} must have shape {letters} = (..., {size}), got {tuple(tensor.shape)}")


def _check_tensor(op: str, name: str, tensor: object, letters: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor of shape {letters}, got {type(tensor).__name__}")


def check_dtype(op: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """The dtype of one tensor must be among those allowed."""
    if tensor.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: {name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_together(op: str, *, same_dtype: bool = True, **tensors: Tensor | None) -> None:
    """All tensors on one device that ops run on and, unless told otherwise, of one dtype."""
    given = [tensor for tensor in tensors.values() if tensor is not None]
    device, dtype = given[0].device, given[0].dtype
    for tensor in given:
        if tensor.device != device or (same_dtype and tensor.dtype != dtype):
            _tell_apart(op, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    if backend.current() == "native" and device.type not in _DEVICES:
        raise ValueError(
            f"{op}: tensors must be on {' or '.join(backend.DEVICES)} "
            f"(VAR_EXT_BACKEND=reference runs anywhere), got {device}"
        )


def _tell_apart(op: str, given: dict[str, Tensor]) -> NoReturn:
    if len({tensor.device for tensor in given.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in given.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {places}")
    dtypes = ", ".join(f"{n} {str(t.dtype).removeprefix('torch.')}" for n, t in given.items())
    raise TypeError(f"{op}: all tensors must have one dtype, got {dtypes}")


def as_size(op: str, size: int | Sequence[int]) -> tuple[int, int]:
    """(h, w) from a side or a pair, both at least 1."""
    wanted = "size must be a side or (h, w), whole numbers of at least 1"
    try:
        pair = tuple(map(index, size)) if isinstance(size, Sequence) else (index(size), index(size))
    except TypeError as error:
        raise TypeError(f"{op}: {wanted}, got {size!r}") from error
    require(len(pair) == 2 and min(pair) >= 1, op, wanted, size)
    return pair[0], pair[1]
