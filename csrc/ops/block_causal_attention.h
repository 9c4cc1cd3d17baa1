// block_causal_attention: softmax(scale q k^T + mask) v, where a token sees its own scale and all coarser
// ones.
//
// Sums in fp32. bfloat16 rounds the weights (and, in the backward pass, the gradients of the scores) to
// bfloat16 where the processor multiplies such numbers; everything else is widened to fp32.
#pragma once

#include <vector>

#include "common/stream.h"
#include "ops/attention.h"

namespace var_ext {

struct BlockCausalAttentionParams {
    AttentionParams attention;
    std::vector<int64_t> lengths;  // tokens of each scale, L in all
};

// `patch_nums`: the side of each scale. Checks the contract; throws std::invalid_argument.
BlockCausalAttentionParams block_causal_attention_params(const TensorView& q, const TensorView& k,
                                                         const TensorView& v, const TensorView& out,
                                                         const TensorView& lse,
                                                         const std::vector<int64_t>& patch_nums, float scale);

struct BlockCausalAttentionBackwardParams {
    BlockCausalAttentionParams forward;  // with the `out` and `lse` that it gave
    AttentionGradients gradients;
};

BlockCausalAttentionBackwardParams block_causal_attention_backward_params(
    const TensorView& grad_out, const TensorView& q, const TensorView& k, const TensorView& v,
    const TensorView& out, const TensorView& lse, const TensorView& dq, const TensorView& dk,
    const TensorView& dv, const TensorView* delta, const std::vector<int64_t>& patch_nums, float scale);

namespace cpu {
void block_causal_attention(const BlockCausalAttentionParams& p);
void block_causal_attention_backward(const BlockCausalAttentionBackwardParams& p);
}  // namespace cpu

namespace cuda {  // D is 32, 64 or 128, rows begin at multiples of 16 bytes
void block_causal_attention(const BlockCausalAttentionParams& p, const CudaStream& stream);
void block_causal_attention_backward(const BlockCausalAttentionBackwardParams& p, const CudaStream& stream);
}  // namespace cuda

}  // namespace var_ext
