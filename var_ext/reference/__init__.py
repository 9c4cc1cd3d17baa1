"""Every op in plain PyTorch: the oracle in tests, the baseline in benchmarks, the fallback where there is no kernel.

Same names and arguments as `var_ext.ops`; inputs are not checked again.
"""

from var_ext.reference.adaln import adaln
from var_ext.reference.area_downsample import area_downsample
from var_ext.reference.bias_gelu import bias_gelu
from var_ext.reference.bias_residual import bias_residual
from var_ext.reference.bicubic_upsample import bicubic_upsample
from var_ext.reference.block_causal_attention import block_causal_attention
from var_ext.reference.cached_attention import cached_attention
from var_ext.reference.cross_entropy import cross_entropy
from var_ext.reference.group_norm_silu import group_norm_silu
from var_ext.reference.keyed_dropout import keyed_dropout
from var_ext.reference.linear import linear
from var_ext.reference.nearest_code import nearest_code
from var_ext.reference.qk_norm import qk_norm
from var_ext.reference.quantize_rows import quantize_rows
from var_ext.reference.residual_quantize import residual_quantize
from var_ext.reference.residual_step import residual_step
from var_ext.reference.sample_tokens import sample_tokens

__all__ = [
    "adaln",
    "area_downsample",
    "bias_gelu",
    "bias_residual",
    "bicubic_upsample",
    "block_causal_attention",
    "cached_attention",
    "cross_entropy",
    "group_norm_silu",
    "keyed_dropout",
    "linear",
    "nearest_code",
    "qk_norm",
    "quantize_rows",
    "residual_quantize",
    "residual_step",
    "sample_tokens",
]
