// The loops behind adaln: a few rows at a time, read from memory once.
#pragma once

#include <cstdint>

#include "cpu/variants.h"
#include "ops/adaln.h"

namespace var_ext::cpu {

// Rows [begin, end) of one sample: the unit that a thread computes, and over which gradients are summed
// first.
struct AdalnChunk {
    int64_t b, begin, end;
    bool stream;  // write past the caches: outputs are large, and their rows begin with cache lines
    float* scratch;
};

struct AdalnKernel {
    int64_t (*width)(int64_t channels);  // C, padded to whole vectors: W
    int64_t scratch_rows;                // of a chunk's scratch, (scratch_rows, W)

    void (*forward)(const AdalnParams& p, const AdalnChunk& chunk);

    // sums: (3, W), receives the chunk's part of the gradients of scale, shift and gate
    void (*backward)(const AdalnBackwardParams& p, const AdalnChunk& chunk, float* sums);

    // Adds up the sums (chunks, 3, W) of sample b, first to last.
    void (*add_chunks)(const AdalnBackwardParams& p, int64_t b, const float* sums, int64_t chunks);
};

VAR_EXT_DECLARE_VARIANTS(AdalnKernel, adaln);

}  // namespace var_ext::cpu
