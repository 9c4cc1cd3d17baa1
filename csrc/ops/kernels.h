// The list of all kernels, from which the bindings of CPU and CUDA and the table of kernels are made.
//
// KERNEL(name, its arguments in Python, what it computes): `name_params` takes the arguments and checks them,
// `cpu::name` and `cuda::name` run. Gradients are called name_backward.
// CPU_KERNEL: the same for a kernel of the CPU alone.
// FUNCTION(name, its arguments in Python, what it returns): runs on the host.
#pragma once

#include "ops/adaln.h"
#include "ops/area_downsample.h"
#include "ops/bias_gelu.h"
#include "ops/bias_residual.h"
#include "ops/bicubic_upsample.h"
#include "ops/block_causal_attention.h"
#include "ops/cached_attention.h"
#include "ops/cross_entropy.h"
#include "ops/group_norm_silu.h"
#include "ops/keyed_dropout.h"
#include "ops/linear.h"
#include "ops/nearest_code.h"
#include "ops/qk_norm.h"
#include "ops/quantize_rows.h"
#include "ops/residual_quantize.h"
#include "ops/residual_step.h"
#include "ops/sample_tokens.h"

#define VAR_EXT_KERNELS(KERNEL, CPU_KERNEL, FUNCTION)                                                        \
    KERNEL(adaln, "x scale shift branch gate h y eps",                                                       \
           "y = LayerNorm(h) * (1 + scale) + shift, h = x + gate * branch or x: (B, L, C).")                 \
    KERNEL(                                                                                                  \
        adaln_backward,                                                                                      \
        "grad_y x scale grad_h branch gate grad_x grad_scale grad_shift grad_branch grad_gate scratch eps",  \
        "Gradients of adaln.")                                                                               \
    KERNEL(area_downsample, "x out", "(B, C, H, W) -> (B, C, h, w): window means.")                          \
    KERNEL(area_downsample_backward, "grad_out grad_in",                                                     \
           "The transposed map: (B, C, h, w) -> (B, C, H, W).")                                              \
    KERNEL(bias_gelu, "x bias out", "GELU(x + bias), tanh form: (..., C), (C,) -> (..., C).")                \
    KERNEL(bias_gelu_backward, "grad x bias grad_x grad_bias scratch", "Gradients of bias_gelu.")            \
    KERNEL(bias_residual, "h x bias out", "h + bias + x: (B, C, H, W), (B, C, H, W), (C,) -> (B, C, H, W).") \
    KERNEL(bicubic_upsample, "x out", "(B, C, H, W) -> (B, C, h, w): cubic, a = -0.75.")                     \
    KERNEL(bicubic_upsample_backward, "grad_out grad_in",                                                    \
           "The transposed map: (B, C, h, w) -> (B, C, H, W).")                                              \
    KERNEL(block_causal_attention, "q k v out lse patch_nums scale",                                         \
           "(B, L, H, D) each -> (B, L, H, D) and the log-sum-exp (B, H, L).")                               \
    KERNEL(block_causal_attention_backward, "grad_out q k v out lse dq dk dv delta patch_nums scale",        \
           "Gradients of q, k and v, (B, L, H, D) each.")                                                    \
    KERNEL(cached_attention, "qkv q_bias v_bias log_scale k_cache v_cache out offset scale",                 \
           "qk_norm of (B, l, 3, H, D) into caches (B, Lmax, H, D) at `offset`, and attention to all "       \
           "before: (B, l, H, D).")                                                                          \
    CPU_KERNEL(cross_entropy, "logits targets losses stats smoothing", "(..., V), (...) -> losses, (...).")  \
    CPU_KERNEL(cross_entropy_backward, "grad logits targets stats grad_logits smoothing",                    \
               "The gradient of the logits.")                                                                \
    KERNEL(group_norm_silu, "x weight bias input_bias out stats scratch groups eps",                         \
           "SiLU(GroupNorm(x + input_bias)): (B, C, H, W) -> (B, C, H, W); on CUDA statistics (B, G, 2).")   \
    KERNEL(group_norm_silu_backward,                                                                         \
           "grad x weight bias input_bias grad_x grad_weight grad_bias stats means scratch groups eps",      \
           "Gradients of group_norm_silu.")                                                                  \
    KERNEL(keyed_dropout, "x keys counter out kept",                                                         \
           "x * mask * 2^16 / kept: (B, ...), (B,), (2,) -> (B, ...).")                                      \
    CPU_KERNEL(linear, "x weight bias out bf16", "x weight^T + bias: (R, N), (M, N), (M,) -> (R, M).")       \
    CPU_KERNEL(linear_backward, "grad x weight grad_x grad_weight grad_bias bf16", "Gradients of linear.")   \
    KERNEL(nearest_code, "x codebook out cosine scratch",                                                    \
           "Index of the nearest codebook entry: (N, C), (V, C) -> (N,).")                                   \
    FUNCTION(nearest_code_scratch, "n v c filter",                                                           \
             "Floats of scratch memory of nearest_code on CUDA. `filter`: None, as the sizes make it "       \
             "worthwhile.")                                                                                  \
    KERNEL(qk_norm, "qkv q_bias v_bias log_scale q k v",                                                     \
           "(B, L, 3, H, D) -> q, k, v, (B, L, H, D) each: biases, L2 norm, scale.")                         \
    KERNEL(                                                                                                  \
        qk_norm_backward,                                                                                    \
        "grad_q grad_k grad_v qkv q_bias log_scale grad_qkv grad_q_bias grad_v_bias grad_log_scale scratch", \
        "Gradients of qk_norm.")                                                                             \
    KERNEL(quantize_rows, "x q scale", "(R, C) -> (R, C) uint8 around 128 and a scale a row, (R,).")         \
    KERNEL(residual_quantize,                                                                                \
           "features codebook phi_weight phi_bias phi_index patch_nums ratio cosine tokens f_hat scales "    \
           "scratch",                                                                                        \
           "All scales of the quantizer: (B, C, H, W), (V, C) -> tokens (B, L), f_hat, scales.")             \
    FUNCTION(residual_quantize_scratch, "batch channels codes patch_nums",                                   \
             "Floats of scratch memory of residual_quantize on CUDA.")                                       \
    KERNEL(residual_quantize_backward,                                                                       \
           "grad_scales tokens codebook phi_weight phi_index patch_nums ratio grad_codebook grad_weight "    \
           "grad_bias scratch",                                                                              \
           "The gradients of `scales`.")                                                                     \
    FUNCTION(residual_quantize_backward_scratch, "batch channels patch_nums",                                \
             "Floats of scratch memory of residual_quantize_backward on CUDA.")                              \
    KERNEL(residual_step, "f_hat embedding phi_weight phi_bias ratio out next",                              \
           "out = f_hat + phi(bicubic(embedding)), next = area(out).")                                       \
    KERNEL(residual_step_backward,                                                                           \
           "grad embedding phi_weight ratio grad_embedding grad_weight grad_bias scratch",                   \
           "The gradients of phi(bicubic(embedding)).")                                                      \
    FUNCTION(residual_step_scratch, "batch channels height width",                                           \
             "Floats of scratch memory of residual_step_backward on CUDA.")                                  \
    KERNEL(sample_tokens, "logits seeds out scale_index cfg top_k top_p",                                    \
           "One token a row: (B, L, V) or guided (2B, L, V), (B,) -> (B, L).")
