"""The one bridge from torch tensors to the compiled kernels."""

from __future__ import annotations

import threading

import torch

try:
    from var_ext import _C
except ImportError:  # `var_ext.backend` has told already, unless the reference backend is in force
    _DTYPES: dict[torch.dtype, _C.DType] = {}
else:
    _DTYPES = {
        torch.float32: _C.DType.float32,
        torch.float64: _C.DType.float64,
        torch.bfloat16: _C.DType.bfloat16,
        torch.float16: _C.DType.float16,
        torch.int64: _C.DType.int64,
    }


_thread = threading.local()


def view(tensor: torch.Tensor) -> _C.TensorView:
    """Borrow `tensor` for one kernel call: any shape and strides; fp32, fp64, bf16, fp16 or int64.

    The view does not keep the tensor alive: hold the tensor until the kernel has returned.

    Raises:
        TypeError: the dtype has no kernel.
    """
    # a new thread has another number of OpenMP threads until torch sets its own
    if not hasattr(_thread, "counted"):
        _thread.counted = torch.get_num_threads()
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        wanted = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        raise TypeError(f"native kernels take tensors of dtype {wanted}, got {tensor.dtype}")
    return _C.TensorView(tensor.data_ptr(), tensor.shape, tensor.stride(), dtype)


def maybe_view(tensor: torch.Tensor | None) -> _C.TensorView | None:
    """`view` of a tensor that need not be given."""
    return None if tensor is None else view(tensor)


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy of it if its last axis is not contiguous: for kernels that read rows."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
