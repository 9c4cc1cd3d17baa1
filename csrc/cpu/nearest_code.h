// The search behind nearest_code: rows and codes in blocks that fit the registers, no distance matrix.
#pragma once

#include <cstdint>

#include "common/buffer.h"
#include "cpu/variants.h"
#include "ops/nearest_code.h"

namespace var_ext::cpu {

// The codebook in lower precision, for variants that rule out most panels with it.
struct NearestCodeFilter {
    const uint32_t* panels;  // (panels, ceil(C / 2), L) pairs of channels
    float norms[2];          // bounds of |e| and of |e - its rounded value|
    float largest_bias;
};

struct NearestCodeKernel {
    int64_t row_block;   // R rows of x at a time ...
    int64_t code_block;  // ... against panels of L codes

    // Codes first .. first + count (at most L) into one panel (C, L) and its bias (L,): |e|^2 / 2, 0 for
    // cosine, infinity in the columns without a code. Returns the largest sum |e| over the codes; NaN if one
    // holds a NaN.
    float (*pack)(const NearestCodeParams& p, int64_t first, int64_t count, float* panel, float* bias);

    // rows: (C, R), panels: (panels, C, L), bias: (panels, L), all finite but for the padding.
    // best: (R,) the lowest index v that minimises bias[v] - row.code[v].
    void (*search)(const float* rows, const float* panels, const float* bias, int64_t panel_count, int64_t c,
                   int32_t* best);

    // Null, or: one panel for the filter, and its norms; then the search, with the same results. False if the
    // filter does not pay for these rows: nothing is found then. scratch: panels * R * L / 2 + ceil(C / 2) *
    // R.
    void (*pack_filter)(const float* panel, int64_t c, uint32_t* filter, float* norms);
    bool (*search_filtered)(const float* rows, const float* panels, const float* bias,
                            const NearestCodeFilter& filter, int64_t panel_count, int64_t c, float* scratch,
                            int32_t* best);
};

VAR_EXT_DECLARE_VARIANTS(NearestCodeKernel, nearest_code);

// The codebook as (panels, C, L), L codes side by side, with the part of the score that does not depend on x.
struct PackedCodebook {
    const NearestCodeKernel* kernel;  // the variant whose blocks these are
    int64_t panel_count;
    Buffer<float> panels, bias;
    float size = 0;        // the largest sum |e| over the codes; NaN if one holds a NaN
    Buffer<uint32_t> low;  // the panels of the filter, if it is used
    NearestCodeFilter filter = {};
};

// nearest_code in two steps, for callers that search the same codebook several times, `rows` rows in all.
// Packing reads only the codebook of `p`.
PackedCodebook pack_codebook(const NearestCodeParams& p, int64_t rows);
void nearest_code(const NearestCodeParams& p, const PackedCodebook& packed);

}  // namespace var_ext::cpu
