"""The one place that picks the backend of an op.

`native` (the default) runs the hand-written kernel of this build; `reference` runs its plain PyTorch equivalent.
An op without a kernel for a device runs its reference there; `python -m var_ext` shows which.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

CHOICES = ("native", "reference")
DEVICES = ("cpu", "cuda")


def _checked(choice: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"VAR_EXT_BACKEND must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


_choice = _checked(os.environ.get("VAR_EXT_BACKEND", "native"))


def current() -> str:
    """The active backend: "native" or "reference"."""
    return _choice


@contextmanager
def force(choice: str) -> Iterator[None]:
    """Run a block on one backend, whatever VAR_EXT_BACKEND says. Not thread-safe: meant for tests and benchmarks.

    Raises:
        ValueError: if `choice` is not a backend.
    """
    global _choice
    before, _choice = _choice, _checked(choice)
    try:
        yield
    finally:
        _choice = before


def _load_kernels() -> dict[str, tuple[str, ...]]:
    try:
        from var_ext import _C
    except ImportError as error:
        if _choice == "reference":
            return {}
        raise ImportError(
            f"the compiled part of var_ext could not be loaded ({error}); build it with `pip install .`, "
            "or set VAR_EXT_BACKEND=reference to run without it"
        ) from error
    return {name: tuple(devices) for name, devices in _C.kernels().items()}


_kernels = _load_kernels()


def kernel_devices(op: str) -> tuple[str, ...]:
    """Device types for which this build has a native kernel of `op`."""
    return _kernels.get(op, ())


def use_native(op: str, device_type: str) -> bool:
    """Whether `op` runs its native kernel on tensors of this device type now."""
    return _choice == "native" and device_type in _kernels.get(op, ())


def multiplies(device_type: str, *, bf16: bool) -> bool:
    """Whether layers multiply with `ops.linear`, in bfloat16 or float32: where its kernel is faster than torch's."""
    if not use_native("linear", device_type):
        return False
    from var_ext import _C

    return _C.multiplies_faster(bf16)
