#include "ops/block_causal_attention.h"

#include "cuda/attention_backward_fp32.cuh"

namespace var_ext::cuda {

void block_causal_attention_backward(const BlockCausalAttentionBackwardParams& p, const CudaStream& stream) {
    const AttentionParams& attention = p.forward.attention;
    if (attention.dtype != DType::float32) return;
    if (attention.dim == 32) launch_attention_backward_fp32<32>(p, stream);
    if (attention.dim == 64) launch_attention_backward_fp32<64>(p, stream);
    if (attention.dim == 128) launch_attention_backward_fp32<128>(p, stream);
}

}  // namespace var_ext::cuda
