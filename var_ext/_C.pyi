"""Kernels of var_ext. Use the functions of var_ext.ops: they check, dispatch and differentiate.

Kernels write into tensors that the caller allocated. They raise ValueError for a broken contract, with a message
such as "nearest_code: codebook must have shape (V, 32), got (4096, 31)", and release the GIL while they run.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypedDict

class DType:
    """Element type of a TensorView."""

    float32: ClassVar[DType]
    float64: ClassVar[DType]
    bfloat16: ClassVar[DType]
    float16: ClassVar[DType]
    int64: ClassVar[DType]
    uint8: ClassVar[DType]
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class TensorView:
    """A borrowed strided tensor: address in bytes, strides in elements. It does not keep the memory alive."""

    def __init__(self, ptr: int, shape: Sequence[int], strides: Sequence[int], dtype: DType) -> None: ...
    @property
    def ptr(self) -> int: ...
    @property
    def shape(self) -> list[int]: ...
    @property
    def strides(self) -> list[int]: ...
    @property
    def dtype(self) -> DType: ...

class BuildInfo(TypedDict):
    version: str
    compiler: str
    build_type: str
    cuda: str | None
    cuda_targets: str | None
    openmp: bool

class CpuInfo(TypedDict):
    isa: list[str]
    selected: str

def build_info() -> BuildInfo:
    """How this extension was built; `cuda` is the toolkit's version, `cuda_targets` CMake's
    names of the chips; None in a CPU build."""

def cpu_info() -> CpuInfo:
    """Variants of the CPU kernels that run on this processor, weakest first, and the selected one."""

def cuda_devices() -> list[str]:
    """GPUs that this process can see, e.g. "NVIDIA H100 (sm_90)"; empty without any, or in a CPU build."""

def kernels() -> dict[str, list[str]]:
    """Ops of this build and the device types that they run on, e.g. {"nearest_code": ["cpu"]}."""

def isa() -> str:
    """The selected variant: "portable", "avx2", "avx512" or "avx512_bf16"; VAR_EXT_ISA picks one at import."""

def set_isa(name: str) -> None:
    """Force a variant in this process. ValueError names the supported ones."""

def multiplies_faster(bf16: bool) -> bool:
    """Whether `linear` is faster here than torch's products, with factors of bfloat16 or float32."""

class CudaStream:
    """A stream of a GPU, with the kernels as methods that launch there and do not wait. In builds with CUDA alone.

    They raise RuntimeError where CUDA reports an error.
    """

    def __init__(self, device: int, handle: int) -> None: ...
    def __getattr__(self, kernel: str) -> Callable[..., None]: ...

def __getattr__(kernel: str) -> Any:
    """A kernel, or the size of its scratch memory; csrc/ops/kernels.h has the arguments."""
