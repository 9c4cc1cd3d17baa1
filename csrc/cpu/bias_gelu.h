// What a variant of bias_gelu offers to the entry. Plain functions and pointers only, see resample.h.
#pragma once

#include <cstdint>

#include "cpu/variants.h"
#include "ops/bias_gelu.h"

namespace var_ext::cpu {

struct BiasGeluKernel {
    // Rows [begin, end). Backward leaves the sums of the gradient over these rows in `sums`, (padded,).
    void (*forward)(const BiasGeluParams& p, int64_t begin, int64_t end);
    void (*backward)(const BiasGeluParams& p, int64_t begin, int64_t end, float* sums);
    // The gradient of the bias: the sum of `chunks` such sums, `padded` floats apart.
    void (*add_up)(const BiasGeluParams& p, const float* sums, int64_t chunks, int64_t padded);
};

VAR_EXT_DECLARE_VARIANTS(BiasGeluKernel, bias_gelu);

}  // namespace var_ext::cpu
