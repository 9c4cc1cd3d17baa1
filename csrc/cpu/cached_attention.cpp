#include "ops/cached_attention.h"

#include <algorithm>

#include "cpu/attention.h"

namespace var_ext::cpu {

void cached_attention(const AttentionParams& p) {
    std::vector<AttentionTile> tiles;
    for (int64_t first = 0; first < p.queries; first += attention_tile) {
        tiles.push_back({first, std::min(attention_tile, p.queries - first), p.keys, false});
    }
    attention(p, tiles, {});
}

}  // namespace var_ext::cpu
