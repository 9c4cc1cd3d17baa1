"""A model as executed: a copy of its modules that shares what it can, with its layers cast, packed or in 8 bits.

The copy has the same classes, so the forward methods of `var_ext.models` run, and user changes take effect:

- hooks, attributes and methods are the model's own;
- a layer with hooks, of another class or with its own forward is called as it is;
- so is a module whose forward is not from `var_ext.models`, with all inside it: in the precision of its own weights.

What user code writes to `self` during sampling stays in the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from var_ext import _torch
from var_ext.engine.layers import Norm, convolution, linear, unchanged, upsampling
from var_ext.engine.precision import Precision
from var_ext.models.modules import Dropout, DropPath, is_plain
from var_ext.models.vqvae import Upsample

IDLE_IN_EVALUATION = (nn.Identity, nn.Dropout, Dropout, DropPath)


class Execution:
    """Turns modules into what is run.

    Args:
        precision: of all layers and other parameters.
        pack: on the CPU keep weights packed for oneDNN.
        free: free a module's own weight once there is a copy.
    """

    def __init__(self, precision: Precision, *, pack: bool, free: bool) -> None:
        self.precision = precision
        self._pack, self._free = pack, free
        self.only_known = True  # no user code in the copy
        self._convolution = partial(convolution, precision=precision, pack=pack, free=free)
        self._upsampling = partial(upsampling, precision=precision, pack=pack, free=free)

    def of(self, module: Any, *, quantizable: bool = False, own: bool = False) -> Any:
        """The replacement of a module.

        Args:
            quantizable: its linear layers may be run in 8 bits.
            own: keep the precision of its weights.
        """
        if module is None:
            return None
        if own:
            if is_plain(module, nn.Linear):
                return linear(module, Precision("", module.weight.dtype), pack=False)
            self.only_known &= not any(map(_torch.has_forward_hooks, module.modules()))
            return module
        if is_plain(module, nn.Linear):
            return linear(module, self.precision, pack=self._pack, free=self._free, int8=quantizable)
        if is_plain(module, nn.Conv2d):
            return self._convolution(module)
        if is_plain(module, nn.GroupNorm) and module.affine:
            return Norm(module, self.precision.dtype)
        if any(is_plain(module, kind) for kind in IDLE_IN_EVALUATION):
            return unchanged
        if is_plain(module, Upsample) and is_plain(module.conv, nn.Conv2d):
            return self._upsampling(module.conv)
        if _is_known(module):
            return self.copy(module, quantizable=quantizable)
        self.only_known = False
        return Called(module, self.precision.dtype)

    def copy(self, module: nn.Module, *, without: tuple[str, ...] = (), quantizable: bool = False) -> Any:
        """A module of the same class with copies of its children; those named in `without` are shared."""
        twin = object.__new__(type(module))
        attributes = twin.__dict__
        attributes.update(module.__dict__, training=False, runs_in=self.precision.dtype)
        _torch.forget_compilation(twin)
        self.only_known &= not _torch.has_forward_hooks(module)
        for name, value in module.__dict__.items():
            if isinstance(value, MethodType) and value.__self__ is module:
                attributes[name] = MethodType(value.__func__, twin)
            self.only_known &= not isinstance(value, FunctionType | MethodType)
        inside: frozenset[str] | None = getattr(module, "in_engines_precision", None)

        def own(name: str) -> bool:
            return inside is not None and name not in inside

        quantizable = quantizable or getattr(module, "quantizable", False)
        parameters = {
            name: p if p is None or own(name) else self._cast(p)
            for name, p in _torch.parameters_of(module).items()
        }
        children = {
            name: child if name in without else self.of(child, quantizable=quantizable, own=own(name))
            for name, child in _torch.children_of(module).items()
        }
        _torch.put_inside(twin, parameters, children)
        attributes.update({**parameters, **children})  # found at once, where nn.Module would search
        return twin

    def _cast(self, parameter: Tensor) -> Tensor:
        value = parameter.detach()
        return value.to(self.precision.dtype) if value.is_floating_point() else value


def _is_known(module: nn.Module) -> bool:
    """Whether a copy with cast parameters computes the same: forward is from `var_ext.models` or torch."""
    if "forward" in module.__dict__:
        return False
    if isinstance(module, nn.Linear | nn.Conv2d):  # has hooks, else it would be plain
        return False
    where = type(module).forward.__module__
    return where.startswith("var_ext.models.") or type(module).__module__.startswith("torch.nn.modules.")


class Called:
    """A module that is called as it is, in the precision of its own weights. Other attributes are the module's."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._called, self.dtype = module, dtype

    def __call__(self, *given: Any, **named: Any) -> Any:
        own = next((p.dtype for p in self._called.parameters() if p.is_floating_point()), self.dtype)
        given, named = _each(lambda t: t.to(own), (given, named))
        return _each(lambda t: t.to(self.dtype), self._called(*given, **named))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_called"], name)


def _each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with its floating-point tensors changed, inside tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        parts = [_each(change, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if type(value) is dict:
        return {key: _each(change, part) for key, part in value.items()}
    return value
