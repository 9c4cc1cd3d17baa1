"""The one bridge from torch tensors to the compiled kernels."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import torch

from var_ext import _torch

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
        torch.uint8: _C.DType.uint8,
    }


_thread = threading.local()


def view(tensor: torch.Tensor) -> _C.TensorView:
    """Borrow `tensor` for one kernel call: any shape and strides; fp32, fp64, bf16, fp16, int64 or uint8.

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


def map_layout(x: torch.Tensor) -> torch.memory_format:
    """Of maps that an op makes from x (B, C, H, W): channels-last for a channels-last x, else contiguous."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def is_gpu(tensor: torch.Tensor) -> bool:
    """Whether the CUDA kernels run on `tensor`."""
    return tensor.is_cuda


def kernels(tensor: torch.Tensor) -> Any:
    """The kernels for the device of `tensor`, by name: `_C`, or a stream of the GPU with the same methods.

    On a GPU they are launched on the current stream of the tensor's device and not waited for.
    """
    return gpu_stream(tensor) if is_gpu(tensor) else _C


def gpu_stream(tensor: torch.Tensor) -> _C.CudaStream:
    """The current stream of the device that `tensor` lies on."""
    device = tensor.get_device()
    return _C.CudaStream(device, _torch.raw_stream(device))


def multiprocessors(tensor: torch.Tensor) -> int:
    """How many the GPU of `tensor` has; 0 on the CPU."""
    return _multiprocessors_of(tensor.get_device()) if is_gpu(tensor) else 0


@cache
def _multiprocessors_of(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy that kernels can read by rows: a contiguous last axis, on a GPU rows aligned to 16 bytes."""
    if is_gpu(tensor):
        return tensor if has_aligned_rows(tensor) else tensor.clone(memory_format=torch.contiguous_format)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def scratch(like: torch.Tensor, *shape: int) -> torch.Tensor | None:
    """float32 memory for a kernel on the GPU of `like`, which may not allocate; None on the CPU, where kernels do."""
    return torch.empty(shape, dtype=torch.float32, device=like.device) if is_gpu(like) else None


def has_aligned_rows(tensor: torch.Tensor) -> bool:
    """Whether rows along the last axis are contiguous and begin at multiples of 16 bytes."""
    *outer, last = tensor.stride()
    bits = tensor.data_ptr()
    for stride, size in zip(outer, tensor.shape, strict=False):
        if size > 1:
            bits |= stride * tensor.element_size()
    return (last == 1 or tensor.shape[-1] == 1) and bits % 16 == 0
