#include "ops/block_causal_attention.h"

#include "cuda/schedule.cuh"

namespace var_ext::cuda {

void block_causal_attention(const BlockCausalAttentionParams& p, const CudaStream&) {
    make_schedule("block_causal_attention", p.lengths);
}

}  // namespace var_ext::cuda
