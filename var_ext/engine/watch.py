"""Detects changes to a model. It is asked before every sampling run, so it must be quick."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

from var_ext import _torch
from var_ext.models.modules import Part

_changes = attrgetter("changes")


class Watch:
    """Detects that modules changed since it was created.

    Noticed: parameters and buffers written in place, moved, cast, or replaced; modules replaced, added or removed;
    hooks; a patched forward; attributes of this package's modules. Not noticed: writes through `.data` and under
    `torch.inference_mode`, which torch does not record; attributes of other modules (`eps`, the scale of an adapter);
    changes inside attributes that are not tensors.

    All comparisons run in C over flat lists built once: walking the modules can take longer than sampling.

    Args:
        roots: modules to watch, with all submodules.
        without: submodules to leave out, with all theirs.
    """

    def __init__(self, roots: Sequence[nn.Module], *, without: Sequence[nn.Module] = ()) -> None:
        left_out = {module for root in without for module in root.modules()}
        modules = [m for m in dict.fromkeys(chain(*(r.modules() for r in roots))) if m not in left_out]
        self._owners: list[dict[str, Any]] = [
            d
            for m in modules
            for d in (_torch.parameters_of(m), _torch.children_of(m), _torch.buffers_of(m))
            if d
        ]
        self._owned = list(_values(self._owners))  # parameters, modules and buffers
        # Modules without either: nothing to compare, but something may be added to them.
        self._empty = [d for m in modules for d in (_torch.parameters_of(m), _torch.children_of(m)) if not d]
        owners = (d for m in modules for d in (_torch.parameters_of(m), _torch.buffers_of(m)))
        parameters = [t for d in owners for t in d.values() if t is not None]  # and buffers
        self._tensors = parameters
        self._recorded = [p for p in parameters if not p.is_inference()]  # the others have no version
        # Keep the memory alive: a reused address would hide a change.
        self._held = [p.detach() for p in parameters]
        self._watched, self._dicts = modules, [m.__dict__ for m in modules]
        self._parts = [m for m in modules if isinstance(m, Part)]
        self._hooks = list(chain.from_iterable(map(_torch.hooks_of, modules)))
        self._state = self._present()

    def _present(self) -> tuple[list[Any], ...]:
        hooked = [tuple(hooks.values()) for hooks in self._hooks] if any(self._hooks) else []
        return (
            list(map(_torch.version_of, self._recorded)),
            list(map(Tensor.data_ptr, self._tensors)),
            list(map(type, self._watched)),
            list(map(len, self._dicts)),
            list(map(_changes, self._parts)),
            hooked,
        )

    def unchanged(self) -> bool:
        """Whether nothing changed."""
        owned = list(_values(self._owners))
        return (
            len(owned) == len(self._owned)
            and all(map(is_, owned, self._owned))
            and not any(self._empty)
            and self._state == self._present()
        )


def _values(owners: list[dict[str, Any]]) -> Iterable[Any]:
    return chain.from_iterable(map(dict.values, owners))
