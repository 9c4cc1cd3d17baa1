#include "ops/cached_attention.h"

#include "cuda/attention.cuh"

namespace var_ext::cuda {

void cached_attention(const AttentionParams& p, const CudaStream& stream) {
    constexpr const char* op = "cached_attention";
    check_attention(op, p);
    for_heads(p, [&](auto element, auto dim) {
        launch_attention_forward<decltype(element), dim>(op, p, stream, [&](int32_t rows) {
            return FullTiles{static_cast<int32_t>(p.queries), static_cast<int32_t>(p.keys), rows};
        });
    });
}

}  // namespace var_ext::cuda
