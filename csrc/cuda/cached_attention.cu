#include "ops/cached_attention.h"

#include "cuda/attention.cuh"

namespace var_ext::cuda {

void cached_attention(const AttentionParams& p, const CudaStream& stream) {
    launch_attention_forward("cached_attention", p, stream, [&](int32_t rows) {
        return FullTiles{static_cast<int32_t>(p.queries), static_cast<int32_t>(p.keys), rows};
    });
}

}  // namespace var_ext::cuda
