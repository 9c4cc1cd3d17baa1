// What a variant of bias_residual offers to the entry. Plain functions and pointers only, see resample.h.
#pragma once

#include <cstdint>

#include "cpu/variants.h"
#include "ops/bias_residual.h"

namespace var_ext::cpu {

struct BiasResidualKernel {
    // Channels-last maps: pixels [begin, end) of all B * pixels. Contiguous ones: maps of all B * C.
    void (*pixels)(const BiasResidualParams& p, int64_t begin, int64_t end);
    void (*maps)(const BiasResidualParams& p, int64_t begin, int64_t end);
};

VAR_EXT_DECLARE_VARIANTS(BiasResidualKernel, bias_residual);

}  // namespace var_ext::cpu
