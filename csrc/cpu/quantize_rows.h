// What a variant of quantize_rows offers to the entry. Plain functions and pointers only, see resample.h.
#pragma once

#include <cstdint>

#include "cpu/variants.h"
#include "ops/quantize_rows.h"

namespace var_ext::cpu {

struct QuantizeRowsKernel {
    void (*run)(const QuantizeRowsParams& p, int64_t begin, int64_t end);  // rows [begin, end)
};

VAR_EXT_DECLARE_VARIANTS(QuantizeRowsKernel, quantize_rows);

}  // namespace var_ext::cpu
