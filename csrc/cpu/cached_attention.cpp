#include "ops/cached_attention.h"

#include <algorithm>

#include "cpu/attention.h"

namespace var_ext::cpu {

void cached_attention(const CachedAttentionParams& p) {
    qk_norm(p.norm);
    std::vector<AttentionTile> tiles;
    const AttentionParams& a = p.attention;
    for (int64_t first = 0; first < a.queries; first += attention_tile) {
        tiles.push_back({first, std::min(attention_tile, a.queries - first), a.keys, false});
    }
    attention(a, tiles, {});
}

}  // namespace var_ext::cpu
