// One row of sample_tokens, as the variants see it.
#pragma once

#include <cstdint>

#include "cpu/variants.h"
#include "ops/sample_tokens.h"

namespace var_ext::cpu {

constexpr int64_t sample_chunk = 128;  // elements between two stored prefix sums

struct SampleRow {
    const void *cond, *uncond;  // (V,) of the dtype of the logits; uncond only with guidance
    uint32_t word;              // the random word of this row
    SampleSettings settings;    // of its image
};

// Scratch of a thread; a vector may be written beyond V elements.
struct SampleScratch {
    float *row, *list, *work;
    int32_t *weights, *work_weights;
    uint64_t* sums;                 // one for each chunk
    void *cond_copy, *uncond_copy;  // for logits whose last axis has a stride
};

struct SampleTokensKernel {
    // The token drawn, -1 if the row has NaN or no finite maximum. prefilter: of 32 logits spread over the
    // row, the one with so many above it bounds the top k from below, very likely; 0: do not look.
    int64_t (*draw_f32)(const SampleTokensParams&, const SampleRow&, const SampleScratch&, int prefilter);
    int64_t (*draw_bf16)(const SampleTokensParams&, const SampleRow&, const SampleScratch&, int prefilter);
    int64_t (*draw_f16)(const SampleTokensParams&, const SampleRow&, const SampleScratch&, int prefilter);
};

VAR_EXT_DECLARE_VARIANTS(SampleTokensKernel, sample_tokens);

}  // namespace var_ext::cpu
