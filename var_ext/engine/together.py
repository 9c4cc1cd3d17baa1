"""Linear layers that read the same input, as one product: on a GPU a launch costs more than such a layer."""

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
    """SiLU and its linear layer among others of the same input."""

    def __init__(self, together: Together, silu: nn.Module, layer: Dense, rows: slice) -> None:
        self._together, self._silu, self._layer, self._rows = together, silu, layer, rows

    def __call__(self, x: Tensor) -> Tensor:
        # a copied module shares the hooks of its original, so there may be some by now
        whole = self._together.product(x) if is_plain(self._silu, nn.SiLU) else None
        return self._layer(self._silu(x)) if whole is None else whole[..., self._rows]


class Together:
    """The SiLU, and the linear layers after it, of several `nn.Sequential` with copies of weights of their own.

    Args:
        found: what an engine made of them; they are changed to take their shares.
    """

    def __init__(self, found: Sequence[nn.Sequential]) -> None:
        dense: list[Dense] = [sequence[1] for sequence in found]  # type: ignore[misc]
        weight, bias = (torch.cat([getattr(d, name) for d in dense]) for name in ("weight", "bias"))
        self._layer = Dense(weight, bias, dense[0].dtype)
        self._mine = threading.local()  # of a sampling, and threads may share an engine
        sizes = [len(layer.weight) for layer in dense]
        for sequence, layer, size, end in zip(found, dense, sizes, accumulate(sizes), strict=True):
            rows = slice(end - size, end)
            layer.weight, layer.bias = weight[rows], bias[rows]  # lets go of their own
            _torch.put_inside(sequence, {}, {"0": Member(self, sequence[0], layer, rows)})

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside, one product serves all that are called with one tensor; it must not change meanwhile."""
        self._mine.kept = []
        try:
            yield
        finally:
            self._mine.kept = None

    def product(self, x: Tensor) -> Tensor | None:
        """Of all layers, or None where each computes its own."""
        kept: list[Tensor] | None = getattr(self._mine, "kept", None)
        if kept is None:
            return None
        if not kept or kept[0] is not x:
            kept[:] = x, self._layer(F.silu(x))
        return kept[1]


def put_together(made: Sequence[Any], originals: Sequence[Any]) -> Together | None:
    """Puts those together that are SiLU and a linear layer and nothing else, on a GPU, where the engine's weights are
    copies in any case.

    Args:
        made: what an engine made of `originals`.
    """
    pairs = zip(made, originals, strict=True)
    found = [m for m, original in pairs if _is_member(m) and _is_copied(m, original)]
    alike = found and len({m[1].dtype for m in found}) == 1
    return Together(found) if alike and len(found) > 1 else None


def _is_member(made: Any) -> bool:
    if not is_plain(made, nn.Sequential) or len(made) != 2 or not is_plain(made[0], nn.SiLU):
        return False
    layer = made[1]  # packed ones are other classes: a CPU's
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
