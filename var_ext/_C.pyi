"""Kernels of var_ext. Use the functions of var_ext.ops: they check, dispatch and differentiate.

Kernels write into tensors that the caller allocated. They raise ValueError for a broken contract, with a message
such as "nearest_code: codebook must have shape (V, 32), got (4096, 31)", and release the GIL while they run.
"""

from collections.abc import Sequence
from typing import ClassVar, TypedDict

class DType:
    """Element type of a TensorView."""

    float32: ClassVar[DType]
    float64: ClassVar[DType]
    bfloat16: ClassVar[DType]
    float16: ClassVar[DType]
    int64: ClassVar[DType]
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class TensorView:
    """A borrowed strided tensor: address in bytes, strides in elements. It does not keep the memory alive."""

    def __init__(self, ptr: int, shape: Sequence[int], strides: Sequence[int], dtype: DType) -> None: ...
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
    openmp: bool

class CpuInfo(TypedDict):
    isa: list[str]
    selected: str

def nearest_code(x: TensorView, codebook: TensorView, out: TensorView, cosine: bool) -> None:
    """(N, C) float32, (V, C) float32 -> (N,) int64: argmin of squared L2 or argmax of cosine; ties: lowest index."""

def area_downsample(x: TensorView, out: TensorView) -> None:
    """(B, C, H, W) -> (B, C, h, w): means over windows. float32, float64, bfloat16, float16; any strides."""

def area_downsample_backward(grad_out: TensorView, grad_in: TensorView) -> None:
    """(B, C, h, w) -> (B, C, H, W): the transpose of `area_downsample`."""

def bicubic_upsample(x: TensorView, out: TensorView) -> None:
    """(B, C, H, W) -> (B, C, h, w): Keys' cubic, a = -0.75. float32, float64, bfloat16, float16; any strides."""

def bicubic_upsample_backward(grad_out: TensorView, grad_in: TensorView) -> None:
    """(B, C, h, w) -> (B, C, H, W): the transpose of `bicubic_upsample`."""

def block_causal_attention(
    q: TensorView,
    k: TensorView,
    v: TensorView,
    out: TensorView,
    lse: TensorView,
    patch_nums: Sequence[int],
    scale: float,
) -> None:
    """(B, L, H, D) each -> (B, L, H, D) and the log-sum-exp (B, H, L) float32. float32, bfloat16, float16."""

def block_causal_attention_backward(
    grad_out: TensorView,
    q: TensorView,
    k: TensorView,
    v: TensorView,
    out: TensorView,
    lse: TensorView,
    dq: TensorView,
    dk: TensorView,
    dv: TensorView,
    patch_nums: Sequence[int],
    scale: float,
) -> None:
    """Gradients dq, dk, dv, (B, L, H, D) each, from what `block_causal_attention` gave."""

def cached_attention(
    q: TensorView, k_cache: TensorView, v_cache: TensorView, out: TensorView, length: int, scale: float
) -> None:
    """(B, Lq, H, D) against the first `length` keys of (B, Lmax, H, D). float32, bfloat16, float16."""

def build_info() -> BuildInfo:
    """How this extension was built; `cuda` is the toolkit's version, None in a CPU build."""

def cpu_info() -> CpuInfo:
    """Variants of the CPU kernels that run on this processor, weakest first, and the selected one."""

def cuda_devices() -> list[str]:
    """GPUs that this process can see, e.g. "NVIDIA H100 (sm_90)"; empty without any, or in a CPU build."""

def kernels() -> dict[str, list[str]]:
    """Ops of this build and the device types that they run on, e.g. {"nearest_code": ["cpu"]}."""

def isa() -> str:
    """The selected variant: "portable", "avx2" or "avx512" (the variable VAR_EXT_ISA picks one at import)."""

def set_isa(name: str) -> None:
    """Force a variant in this process. ValueError names the supported ones."""
