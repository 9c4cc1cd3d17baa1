"""Counts the kernels that a sampling would launch on a GPU, without one.

Assumed of torch's ops, each in the layout that it is given:

- a product is one kernel, its bias and activation too (cublasLt's epilogue);
- a convolution is one, its bias another, and where channels do not lie last, as in the engine's weights, a copy;
- attention is one (the memory-efficient kernel takes the decoder's head of 640 channels);
- GroupNorm is three, moments, factors, the map; and a copy before and one after where channels lie last;
- all other arithmetic, casts and copies are one each, whatever the dtypes that go in and come out; views and memory
  for results none;
- reductions and libraries use no second kernel of their own (split sums, workspaces to clear).

Kernels of this project count as often as `KERNELS` says; the emulator holds that to account.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from var_ext import _C


def _cached_attention(qkv: _C.TensorView, *_: Any) -> int:
    """One where a block has all queries of a head; in float32 and with more of them `qk_norm` is another."""
    _, queries, _, _, channels = qkv.shape
    return 1 if qkv.dtype != _C.DType.float32 and queries <= (128 if channels <= 64 else 64) else 2


def _group_norm_silu(x: _C.TensorView, *rest: Any) -> int:
    """Two where an image has few chunks of channels-last pixels, which the map adds up itself."""
    batch, partials, channels, _ = rest[5].shape
    by_rows = x.strides[1] == 1 and channels > 1
    return 2 if by_rows and channels <= 1024 and partials <= 64 and batch * partials**2 <= 4096 else 3


# launches of a call with these arguments; where an image has more than 256 pixels, residual_step has two
KERNELS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("adaln", "bias_gelu", "bias_residual", "residual_step", "sample_tokens"), lambda *_: 1),
    "cached_attention": _cached_attention,
    "group_norm_silu": _group_norm_silu,
}

NONE = (
    "detach", "empty", "empty_like", "expand", "new_empty", "permute", "select", "slice", "split", "t", "transpose",
    "unbind", "unsqueeze", "view", "_unsafe_view",
)  # fmt: skip
ONE = (
    "add", "add_", "addcmul", "addmm", "cat", "clamp", "clone", "copy_", "embedding", "full_like", "index", "mm", "mul",
    "mul_", "new_full", "scaled_dot_product_attention", "silu", "stack", "zeros", "_addmm_activation", "_to_copy",
)  # fmt: skip


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> int:
    return 1 + (bias is not None) + (not _channels_last(x))


LAUNCHES: dict[str, Callable[..., int]] = {
    **{name: lambda *_: 0 for name in NONE},
    **{name: lambda *_: 1 for name in ONE},
    "convolution": _convolution,
    "native_group_norm": lambda x, *_: 5 if _channels_last(x) else 3,
}
LEAVES = ("scaled_dot_product_attention",)  # torch composes them of other ops on a CPU
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
COMPOSED = torch._C.DispatchKey.CompositeImplicitAutograd


class Launches(TorchDispatchMode):
    """Counts by part, and by part and op; what it does not know is an error.

    Attributes:
        part: to which launches belong now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "between scales"
        self.parts: Counter[str] = Counter()
        self.ops: Counter[tuple[str, str]] = Counter()

    def add(self, op: str, launches: int) -> None:
        """Counts launches of an op."""
        self.parts[self.part] += launches
        self.ops[self.part, op] += launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        if space == "var_ext":
            with self:  # its body may copy what it is given
                return func.redispatch(CPU, *args, **kwargs)
        if name not in LEAVES and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSED.name):
            with self:  # what `func.decompose` calls may be made for tracing, with copies of its own
                return func._op_dk(COMPOSED, *args, **kwargs)
        if space != "aten" or name not in LAUNCHES:
            raise NotImplementedError(f"how many kernels is {func}?")
        self.add(name, LAUNCHES[name](*args))
        return func(*args, **kwargs)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """What runs inside belongs to a part."""
        before, self.part = self.part, part
        yield
        self.part = before

    def during(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """`function`, whose launches belong to a part."""

        def call(*given: Any, **named: Any) -> Any:
            with self.of(part):
                return function(*given, **named)

        return call


class CountedStream:
    """Stands for `_C.CudaStream`: counts a kernel and runs that of the CPU, which takes the same arguments."""

    def __init__(self, launches: Launches) -> None:
        self._launches = launches

    def __getattr__(self, kernel: str) -> Callable[..., None]:
        def call(*given: Any) -> None:
            self._launches.add(kernel, KERNELS[kernel](*given))
            getattr(_C, kernel)(*given)

        return call
