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

def nearest_code(
    x: TensorView, codebook: TensorView, out: TensorView, cosine: bool, scratch: TensorView | None
) -> None:
    """(N, C) float32, (V, C) float32 -> (N,) int64: argmin of squared L2 or argmax of cosine; ties: lowest index."""

def nearest_code_scratch(n: int, v: int, c: int, filter: bool | None = None) -> int:
    """Floats of scratch memory that `nearest_code` needs on CUDA.

    Their number tells the kernels whether to filter on the tensor cores: None, as the sizes make it worth while.
    """

def adaln(
    x: TensorView,
    scale: TensorView,
    shift: TensorView,
    branch: TensorView | None,
    gate: TensorView | None,
    h: TensorView | None,
    y: TensorView,
    eps: float,
) -> None:
    """(B, L, C) -> (B, L, C): y = LayerNorm(h) * (1 + scale) + shift, h = x + gate * branch, or x without a branch.

    Vectors are (B, C). float32, bfloat16, float16; any strides but for C, which is contiguous.
    """

def adaln_backward(
    grad_y: TensorView,
    x: TensorView,
    scale: TensorView,
    grad_h: TensorView | None,
    branch: TensorView | None,
    gate: TensorView | None,
    grad_x: TensorView,
    grad_scale: TensorView,
    grad_shift: TensorView,
    grad_branch: TensorView | None,
    grad_gate: TensorView | None,
    scratch: TensorView | None,
    eps: float,
) -> None:
    """Gradients of `adaln`: (B, L, C) for x and branch, (B, C) for the vectors."""

def qk_norm(
    qkv: TensorView,
    q_bias: TensorView,
    v_bias: TensorView,
    log_scale: TensorView | None,
    q: TensorView,
    k: TensorView,
    v: TensorView,
) -> None:
    """(B, L, 3, H, D) -> q, k, v, (B, L, H, D) each: biases, L2 norm, scale.

    Without log_scale only the biases. float32, bfloat16, float16; any strides but for D, which is contiguous.
    """

def qk_norm_backward(
    grad_q: TensorView,
    grad_k: TensorView,
    grad_v: TensorView,
    qkv: TensorView,
    q_bias: TensorView,
    log_scale: TensorView | None,
    grad_qkv: TensorView,
    grad_q_bias: TensorView,
    grad_v_bias: TensorView,
    grad_log_scale: TensorView | None,
    scratch: TensorView | None,
) -> None:
    """Gradients of `qk_norm`: (B, L, 3, H, D), (H, D) twice, and (H,) where there is a log_scale."""

def area_downsample(x: TensorView, out: TensorView) -> None:
    """(B, C, H, W) -> (B, C, h, w): means over windows. float32, float64, bfloat16, float16; any strides."""

def area_downsample_backward(grad_out: TensorView, grad_in: TensorView) -> None:
    """(B, C, h, w) -> (B, C, H, W): the transpose of `area_downsample`."""

def bicubic_upsample(x: TensorView, out: TensorView) -> None:
    """(B, C, H, W) -> (B, C, h, w): Keys' cubic, a = -0.75. float32, float64, bfloat16, float16; any strides."""

def bicubic_upsample_backward(grad_out: TensorView, grad_in: TensorView) -> None:
    """(B, C, h, w) -> (B, C, H, W): the transpose of `bicubic_upsample`."""

def sample_tokens(
    logits: TensorView,
    seeds: TensorView,
    out: TensorView,
    scale_index: int,
    cfg: float | TensorView | None,
    top_k: int | TensorView,
    top_p: float | TensorView,
) -> None:
    """(B, L, V), guided (2B, L, V), float32, bfloat16 or float16, any strides, (B,) int64 -> (B, L) int64.

    ValueError also if a row has NaN or no finite maximum.
    """

def group_norm_silu(
    x: TensorView,
    weight: TensorView,
    bias: TensorView,
    input_bias: TensorView | None,
    out: TensorView,
    stats: TensorView | None,
    scratch: TensorView | None,
    groups: int,
    eps: float,
) -> None:
    """SiLU(GroupNorm(x)): (B, C, H, W) -> (B, C, H, W), both contiguous or both channels-last.

    float32, bfloat16, float16; statistics in float32. weight, bias, input_bias: (C,), any strides.
    """

def group_norm_silu_backward(
    grad: TensorView,
    x: TensorView,
    weight: TensorView,
    bias: TensorView,
    input_bias: TensorView | None,
    grad_x: TensorView,
    grad_weight: TensorView,
    grad_bias: TensorView,
    stats: TensorView | None,
    means: TensorView | None,
    scratch: TensorView | None,
    groups: int,
    eps: float,
) -> None:
    """From the gradient of the output those of x, weight and bias; statistics are computed again on the CPU."""

def bias_gelu(x: TensorView, bias: TensorView, out: TensorView) -> None:
    """(..., C), (C,) -> (..., C): GELU(x + bias), tanh form. float32, bfloat16, float16.

    Rows of x at equal distances, of dense channels; bias and out contiguous.
    """

def bias_gelu_backward(
    grad: TensorView,
    x: TensorView,
    bias: TensorView,
    grad_x: TensorView,
    grad_bias: TensorView,
    scratch: TensorView | None,
) -> None:
    """From the gradient of the output, (..., C), those of x and bias."""

def bias_residual(h: TensorView, x: TensorView, bias: TensorView, out: TensorView) -> None:
    """(B, C, H, W), (B, C, H, W), (C,) -> (B, C, H, W): h + bias + x. float32, bfloat16, float16.

    All maps contiguous or all channels-last, bias dense; out may be h or x itself.
    """

def quantize_rows(x: TensorView, q: TensorView, scale: TensorView) -> None:
    """(R, C) float32, bfloat16, float16 -> (R, C) uint8 around 128, and (R,) float32: the scale of each row.

    Rows of x at any distance, of dense channels; q and scale contiguous.
    """

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
    scratch: TensorView | None,
) -> None:
    """Gradients of phi(bicubic_upsample(embedding)) for the gradient of its result; None: not wanted. float32."""

def residual_step_scratch(batch: int, channels: int, height: int, width: int) -> int:
    """Floats of scratch memory that `residual_step_backward` needs on CUDA."""

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
    scratch: TensorView | None,
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
    scratch: TensorView | None,
) -> None:
    """Gradients of `scales`, with the tokens as they were found. float32, contiguous but for the codebook."""

def residual_quantize_scratch(batch: int, channels: int, codes: int, patch_nums: Sequence[int]) -> int:
    """Floats of scratch memory that `residual_quantize` needs on CUDA."""

def residual_quantize_backward_scratch(batch: int, channels: int, patch_nums: Sequence[int]) -> int:
    """Floats of scratch memory that `residual_quantize_backward` needs on CUDA."""

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
    delta: TensorView | None,
    patch_nums: Sequence[int],
    scale: float,
) -> None:
    """Gradients dq, dk, dv, (B, L, H, D) each, from what `block_causal_attention` gave."""

def cached_attention(
    qkv: TensorView,
    q_bias: TensorView,
    v_bias: TensorView,
    log_scale: TensorView | None,
    k_cache: TensorView,
    v_cache: TensorView,
    out: TensorView,
    offset: int,
    scale: float,
) -> None:
    """`qk_norm` of (B, l, 3, H, D) into caches (B, Lmax, H, D) at `offset`; attention to all before, (B, l, H, D).

    float32, bfloat16, float16; any strides but for D, which is contiguous.
    """

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

class CudaStream:
    """A stream of a GPU, with the kernels written for GPUs as methods that launch there and do not wait.

    In builds with CUDA alone. They take the arguments of the functions of the same names, plus scratch memory
    (`delta`, `scratch`), and raise RuntimeError where CUDA reports an error.
    """

    def __init__(self, device: int, handle: int) -> None: ...
    area_downsample = area_downsample
    area_downsample_backward = area_downsample_backward
    bicubic_upsample = bicubic_upsample
    bicubic_upsample_backward = bicubic_upsample_backward
    bias_residual = bias_residual
    block_causal_attention = block_causal_attention
    block_causal_attention_backward = block_causal_attention_backward
    cached_attention = cached_attention
    nearest_code = nearest_code
    adaln = adaln
    adaln_backward = adaln_backward
    bias_gelu = bias_gelu
    bias_gelu_backward = bias_gelu_backward
    block_causal_attention = block_causal_attention
    block_causal_attention_backward = block_causal_attention_backward
    cached_attention = cached_attention
    group_norm_silu = group_norm_silu
    group_norm_silu_backward = group_norm_silu_backward
    qk_norm = qk_norm
    qk_norm_backward = qk_norm_backward
    quantize_rows = quantize_rows
    sample_tokens = sample_tokens
    residual_quantize = residual_quantize
    residual_quantize_backward = residual_quantize_backward
    residual_step = residual_step
    residual_step_backward = residual_step_backward
