// The search behind nearest_code: rows and codes in blocks that fit the registers, no distance matrix.
#pragma once

#include <cstdint>

#include "ops/nearest_code.h"

namespace var_ext::cpu {

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
};

extern const NearestCodeKernel nearest_code_portable, nearest_code_avx2, nearest_code_avx512;

}  // namespace var_ext::cpu
