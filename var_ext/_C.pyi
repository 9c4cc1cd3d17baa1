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

def residual_step(
    f_hat: TensorView,
    embedding: TensorView,
    phi_weight: TensorView,
    phi_bias: TensorView,
    ratio: float,
    out: TensorView,
    next: TensorView | None,
) -> None:
    """out = f_hat + phi(bicubic_upsample(embedding)) and, if wanted, next = area_downsample(out). float32."""

def residual_step_backward(
    grad: TensorView,
    embedding: TensorView,
    phi_weight: TensorView,
    ratio: float,
    grad_embedding: TensorView | None,
    grad_weight: TensorView | None,
    grad_bias: TensorView | None,
) -> None:
    """Gradients of phi(bicubic_upsample(embedding)) for the gradient of its result; None: not wanted. float32."""

def residual_quantize(
    features: TensorView,
    codebook: TensorView,
    phi_weight: TensorView,
    phi_bias: TensorView,
    phi_index: Sequence[int],
    patch_nums: Sequence[int],
    ratio: float,
    cosine: bool,
    tokens: TensorView,
    f_hat: TensorView,
    scales: TensorView | None,
) -> None:
    """The whole quantizer, into tokens (B, L), f_hat (B, C, P, P) and scales (K, B, C, P, P). float32."""

def residual_quantize_backward(
    grad_scales: TensorView,
    tokens: TensorView,
    codebook: TensorView,
    phi_weight: TensorView,
    phi_index: Sequence[int],
    patch_nums: Sequence[int],
    ratio: float,
    grad_codebook: TensorView,
    grad_weight: TensorView,
    grad_bias: TensorView,
) -> None:
    """Gradients of `scales`, with the tokens as they were found. float32, contiguous but for the codebook."""

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
