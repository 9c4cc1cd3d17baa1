"""Fuses linear layers with the same input into one matmul: on a GPU a launch costs more than such a layer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from var_ext import _torch
from var_ext.engine import layers
from var_ext.engine.layers import Dense
from var_ext.models.modules import is_plain


class Member:
    """A SiLU and linear layer, fused with others that read the same input."""

    def __init__(self, together: Together, silu: nn.Module, layer: Dense, rows: slice) -> None:
        self._together, self._silu, self._layer, self._rows = together, silu, layer, rows

    def __call__(self, x: Tensor) -> Tensor:
        # a copy shares the hooks of its original, so some may have been added
        whole = self._together.product(x) if is_plain(self._silu, nn.SiLU) else None
        return self._layer(self._silu(x)) if whole is None else whole[..., self._rows]


class Together:
    """The shared SiLU and fused linear layers of several `nn.Sequential`, each with its own copies of weights.

    Args:
        found: the engine's copies of them; changed to take their share of the fused result.
    """

    def __init__(self, found: Sequence[nn.Sequential]) -> None:
        dense: list[Dense] = [sequence[1] for sequence in found]  # type: ignore[misc]
        weight, bias = (torch.cat([getattr(d, name) for d in dense]) for name in ("weight", "bias"))
        self._layer = Dense(weight, bias, dense[0].dtype)
        self._mine = threading.local()  # per sampling run; threads may share an engine
        sizes = [len(layer.weight) for layer in dense]
        for sequence, layer, size, end in zip(found, dense, sizes, accumulate(sizes), strict=True):
            rows = slice(end - size, end)
            layer.weight, layer.bias = weight[rows], bias[rows]  # lets go of their own
            _torch.put_inside(sequence, {}, {"0": Member(self, sequence[0], layer, rows)})

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside, one matmul serves all layers called with the same tensor, which must not change."""
        self._mine.kept = []
        try:
            yield
        finally:
            self._mine.kept = None

    def product(self, x: Tensor) -> Tensor | None:
        """The result for all layers, or None where each computes its own."""
        kept: list[Tensor] | None = getattr(self._mine, "kept", None)
        if kept is None:
            return None
        if not kept or kept[0] is not x:
            kept[:] = x, self._layer(F.silu(x))
        return kept[1]


def put_together(made: Sequence[Any], originals: Sequence[Any]) -> Together | None:
    """Fuses the modules that are exactly a SiLU and a linear layer; only on a GPU, where weights are copied anyway.

    Args:
        made: the engine's copies of `originals`.
    """
    pairs = zip(made, originals, strict=True)
    found = [m for m, original in pairs if _is_member(m) and _is_copied(m, original)]
    alike = found and len({m[1].dtype for m in found}) == 1
    return Together(found) if alike and len(found) > 1 else None


def _is_member(made: Any) -> bool:
    if not is_plain(made, nn.Sequential) or len(made) != 2 or not is_plain(made[0], nn.SiLU):
        return False
    layer = made[1]  # packed layers (CPU) have other classes
    return (
        type(layer) is Dense
        and layer.bias is not None
        and layers.on_gpu(layer.weight)
        and not made[0].inplace
    )


def _is_copied(made: nn.Sequential, original: nn.Sequential) -> bool:
    own: Any = original[1].weight
    dense: Any = made[1]
    return dense.weight.data_ptr() != own.data_ptr()
