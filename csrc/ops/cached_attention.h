// cached_attention: softmax(scale q k^T) v over the first `length` keys of a cache. Sums in fp32.
#pragma once

#include "ops/attention.h"

namespace var_ext {

// Checks the contract; throws std::invalid_argument.
AttentionParams cached_attention_params(const TensorView& q, const TensorView& k_cache,
                                        const TensorView& v_cache, const TensorView& out, int64_t length,
                                        float scale);

namespace cpu {
void cached_attention(const AttentionParams& p);
}

}  // namespace var_ext
