// Attention by tiles of queries and blocks of keys, with a running maximum: no score matrix of L x L.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/variants.h"
#include "ops/attention.h"

namespace var_ext::cpu {

constexpr int64_t attention_tile = 64;   // queries at a time, most
constexpr int64_t attention_block = 96;  // keys at a time, most

struct AttentionTile {
    int64_t first, rows;  // queries
    int64_t keys;         // the most that one of them sees, counted from the first key
    bool mixed;           // they do not all see the same keys
};

struct AttentionTask {  // some tiles of one head
    const AttentionParams* p;
    const AttentionGradients* gradients;  // null in a forward pass
    int64_t b, h;
    const AttentionTile* tiles;
    int64_t tile_count, tile_step;  // every tile_step-th of them
    const int32_t* key_limit;       // (queries,) keys that each sees; read where tiles are mixed
    float* scratch;                 // for this thread
};

struct AttentionKernel {
    void (*forward)(const AttentionTask& task);
    void (*backward)(const AttentionTask& task);  // all tiles of a head
};

VAR_EXT_DECLARE_VARIANTS(AttentionKernel, attention);

void attention(const AttentionParams& p, const std::vector<AttentionTile>& tiles,
               const std::vector<int32_t>& key_limit);
void attention_backward(const AttentionParams& p, const AttentionGradients& gradients,
                        const std::vector<AttentionTile>& tiles, const std::vector<int32_t>& key_limit);

}  // namespace var_ext::cpu
