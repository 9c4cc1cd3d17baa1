"""The ops of VAR: checked, registered with `torch.library` as `torch.ops.var_ext.NAME`, one file per op.

`var_ext.backend` decides whether a call runs the native kernel or the plain PyTorch of `var_ext.reference`.
"""

from var_ext.ops.adaln import adaln
from var_ext.ops.area_downsample import area_downsample
from var_ext.ops.bias_gelu import bias_gelu
from var_ext.ops.bias_residual import bias_residual
from var_ext.ops.bicubic_upsample import bicubic_upsample
from var_ext.ops.block_causal_attention import block_causal_attention
from var_ext.ops.cached_attention import cached_attention
from var_ext.ops.cross_entropy import cross_entropy
from var_ext.ops.group_norm_silu import group_norm_silu
from var_ext.ops.keyed_dropout import keyed_dropout
from var_ext.ops.linear import linear
from var_ext.ops.nearest_code import nearest_code
from var_ext.ops.qk_norm import qk_norm
from var_ext.ops.quantize_rows import quantize_rows
from var_ext.ops.residual_quantize import residual_quantize
from var_ext.ops.residual_step import residual_step
from var_ext.ops.sample_tokens import sample_tokens

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
