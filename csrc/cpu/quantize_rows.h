// What a variant of quantize_rows offers to the entry. Plain functions and pointers only, see resample.h.
#pragma once

#include <cstdint>

#include "ops/quantize_rows.h"

namespace var_ext::cpu {

struct QuantizeRowsKernel {
    void (*run)(const QuantizeRowsParams& p, int64_t begin, int64_t end);  // rows [begin, end)
};

extern const QuantizeRowsKernel quantize_rows_portable, quantize_rows_avx2, quantize_rows_avx512;

}  // namespace var_ext::cpu
