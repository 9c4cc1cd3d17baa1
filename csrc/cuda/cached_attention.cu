#include "ops/cached_attention.h"

#include "cuda/attention_forward_fp32.cuh"

namespace var_ext::cuda {

void cached_attention(const AttentionParams& p, const CudaStream& stream) {
    constexpr const char* op = "cached_attention";
    if (p.dtype != DType::float32) return;
    if (p.dim == 32) launch_attention_forward_fp32<32>(op, p, nullptr, stream);
    if (p.dim == 64) launch_attention_forward_fp32<64>(op, p, nullptr, stream);
    if (p.dim == 128) launch_attention_forward_fp32<128>(op, p, nullptr, stream);
}

}  // namespace var_ext::cuda
