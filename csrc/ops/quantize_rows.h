// quantize_rows: floating-point rows as bytes around 128, and one scale per row: x ~ (q - 128) scale.
//
// quantize_rows_steps.h has the arithmetic; CPU, CUDA and reference are bitwise equal.
#pragma once

#include <cstdint>

#include "common/stream.h"
#include "common/tensor_view.h"

namespace var_ext {

struct QuantizeRowsParams {
    const void* x;  // (rows, C), C >= 1: float32, bfloat16 or float16
    uint8_t* q;     // (rows, C), dense
    float* scale;   // (rows,), dense
    DType dtype;    // of x
    int64_t rows, channels;
    int64_t x_stride;  // in elements, any
};

// Checks the contract; throws std::invalid_argument.
QuantizeRowsParams quantize_rows_params(const TensorView& x, const TensorView& q, const TensorView& scale);

namespace cpu {
void quantize_rows(const QuantizeRowsParams& p);
}
namespace cuda {
void quantize_rows(const QuantizeRowsParams& p, const CudaStream& stream);
}

}  // namespace var_ext
