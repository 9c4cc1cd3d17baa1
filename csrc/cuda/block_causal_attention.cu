#include "ops/block_causal_attention.h"

#include "cuda/attention_forward_fp32.cuh"

namespace var_ext::cuda {

void block_causal_attention(const BlockCausalAttentionParams& p, const CudaStream& stream) {
    constexpr const char* op = "block_causal_attention";
    if (p.attention.dtype != DType::float32) return static_cast<void>(make_schedule(op, p.lengths));
    if (p.attention.dim == 32) launch_attention_forward_fp32<32>(op, p.attention, &p.lengths, stream);
    if (p.attention.dim == 64) launch_attention_forward_fp32<64>(op, p.attention, &p.lengths, stream);
    if (p.attention.dim == 128) launch_attention_forward_fp32<128>(op, p.attention, &p.lengths, stream);
}

}  // namespace var_ext::cuda
