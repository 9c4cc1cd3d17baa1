// cached_attention: qk_norm of a scale's packed qkv, its keys and values into the cache from `offset` on;
// then softmax(scale q k^T) v of its queries over the first offset + l entries. Sums in fp32.
#pragma once

#include "common/stream.h"
#include "ops/attention.h"
#include "ops/qk_norm.h"

namespace var_ext {

// The queries are stored in the result's memory: each row is read before it is overwritten, so they need no
// memory of their own.
struct CachedAttentionParams {
    QkNormParams norm;
    AttentionParams attention;
};

// Checks the contract; throws std::invalid_argument.
CachedAttentionParams cached_attention_params(const TensorView& qkv, const TensorView& q_bias,
                                              const TensorView& v_bias, const TensorView* log_scale,
                                              const TensorView& k_cache, const TensorView& v_cache,
                                              const TensorView& out, int64_t offset, float scale);

namespace cpu {
void cached_attention(const CachedAttentionParams& p);
}
namespace cuda {  // D is 32, 64 or 128, rows of the caches begin at multiples of 16 bytes
void cached_attention(const CachedAttentionParams& p, const CudaStream& stream);
}

}  // namespace var_ext
