#include "ops/block_causal_attention.h"

#include <algorithm>

#include "cpu/attention.h"

namespace var_ext::cpu {

namespace {

struct Plan {
    std::vector<AttentionTile> tiles;
    std::vector<int32_t> key_limit;
};

// A tile lies within one scale, or holds whole ones: small scales share a tile.
Plan plan(const std::vector<int64_t>& lengths) {
    Plan plan;
    int64_t first = 0;
    for (size_t k = 0; k < lengths.size();) {
        int64_t rows = 0, end = first;
        const size_t first_scale = k;
        do {  // as many whole scales as fit, or the one that is too large
            rows += lengths[k];
            end += lengths[k];
            plan.key_limit.insert(plan.key_limit.end(), lengths[k], static_cast<int32_t>(end));
            ++k;
        } while (k < lengths.size() && rows + lengths[k] <= attention_tile);
        const bool mixed = k > first_scale + 1;
        for (; first < end; first += attention_tile) {
            plan.tiles.push_back({first, std::min(attention_tile, end - first), end, mixed});
        }
        first = end;
    }
    return plan;
}

}  // namespace

void block_causal_attention(const BlockCausalAttentionParams& p) {
    const Plan parts = plan(p.lengths);
    attention(p.attention, parts.tiles, parts.key_limit);
}

void block_causal_attention_backward(const BlockCausalAttentionBackwardParams& p) {
    const Plan parts = plan(p.forward.lengths);
    attention_backward(p.forward.attention, p.gradients, parts.tiles, parts.key_limit);
}

}  // namespace var_ext::cpu
