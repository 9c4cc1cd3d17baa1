// The common contract of area_downsample and bicubic_upsample, forward and backward: a grid in, a grid out,
// each of any strides (contiguous, channels-last, a slice ...).
#pragma once

#include <cstdint>

#include "common/tensor_view.h"

namespace var_ext {

struct ResampleParams {
    const void* in;  // (B, C, in_h, in_w)
    void* out;       // (B, C, out_h, out_w), every element is written
    DType dtype;     // of both: float32, float64, bfloat16, float16; sums are fp32 (fp64 for float64)
    int64_t batch, channels;
    int64_t in_h, in_w, out_h, out_w;       // on CUDA at most 16384 each
    int64_t in_strides[4], out_strides[4];  // in elements
};

// Checks the contract; throws std::invalid_argument. The names are those of the op's arguments.
ResampleParams resample_params(const char* op, const char* in_name, const TensorView& in,
                               const char* out_name, const TensorView& out);

}  // namespace var_ext
