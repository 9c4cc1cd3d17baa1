// nearest_code: for every row of x the index of its nearest codebook entry.
//
//   squared L2:  argmin_v |e_v|^2 - 2 x.e_v        cosine:  argmax_v  x/|x| . e_v/|e_v|
//
// fp32 throughout. Ties go to the lowest index. NaN behaves as in torch.argmin / argmax: the first code whose
// score is NaN is the answer, so a row that holds a NaN gets index 0.
#pragma once

#include <cstdint>

#include "common/tensor_view.h"

namespace var_ext {

struct NearestCodeParams {
    const float* x;         // (N, C)
    const float* codebook;  // (V, C), V >= 1
    int64_t* out;           // (N,)
    int64_t n, v, c;
    int64_t x_stride_n, x_stride_c;  // all strides in elements
    int64_t codebook_stride_v, codebook_stride_c;
    int64_t out_stride;
    bool cosine;
};

// Checks the contract; throws std::invalid_argument.
NearestCodeParams nearest_code_params(const TensorView& x, const TensorView& codebook, const TensorView& out,
                                      bool cosine);

namespace cpu {
void nearest_code(const NearestCodeParams& p);
}

}  // namespace var_ext
