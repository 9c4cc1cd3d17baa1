#include "ops/block_causal_attention.h"

#include "cuda/attention.cuh"

namespace var_ext::cuda {

void block_causal_attention(const BlockCausalAttentionParams& p, const CudaStream& stream) {
    constexpr const char* op = "block_causal_attention";
    check_attention(op, p.attention);
    launch_attention_forward(op, p.attention, stream,
                             [&](int32_t rows) { return make_tiles(op, p.lengths, rows); });
}

}  // namespace var_ext::cuda
