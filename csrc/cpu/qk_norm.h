// The loops behind qk_norm: token by token, each head read from memory once.
#pragma once

#include <cstdint>

#include "cpu/variants.h"
#include "ops/qk_norm.h"

namespace var_ext::cpu {

// Tokens [begin, end) of all B * L: the unit that a thread computes, and over which gradients are summed
// first.
struct QkNormChunk {
    int64_t begin, end;
    bool stream;  // write past the caches: outputs are large, and their heads begin with cache lines
    float* scratch;
};

struct QkNormKernel {
    // elements of a chunk's scratch, and of its sums
    int64_t (*scratch_size)(int64_t heads, int64_t channels);
    int64_t (*sums_size)(int64_t heads, int64_t channels);

    void (*forward)(const QkNormParams& p, const QkNormChunk& chunk);

    // sums: receives the chunk's part of the gradients of q_bias, v_bias and log_scale
    void (*backward)(const QkNormBackwardParams& p, const QkNormChunk& chunk, float* sums);

    // Adds up the sums of all chunks, first to last.
    void (*add_chunks)(const QkNormBackwardParams& p, const float* sums, int64_t chunks);
};

VAR_EXT_DECLARE_VARIANTS(QkNormKernel, qk_norm);

}  // namespace var_ext::cpu
