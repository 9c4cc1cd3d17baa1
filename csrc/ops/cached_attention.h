// cached_attention: softmax(scale q k^T) v over the first `length` keys of a cache. Sums in fp32.
#pragma once

#include "cuda/stream.h"
#include "ops/attention.h"

namespace var_ext {

// Checks the contract; throws std::invalid_argument.
AttentionParams cached_attention_params(const TensorView& q, const TensorView& k_cache,
                                        const TensorView& v_cache, const TensorView& out, int64_t length,
                                        float scale);

namespace cpu {
void cached_attention(const AttentionParams& p);
}
namespace cuda {  // D is 32, 64 or 128, rows begin at multiples of 16 bytes
void cached_attention(const AttentionParams& p, const CudaStream& stream);
}

}  // namespace var_ext
