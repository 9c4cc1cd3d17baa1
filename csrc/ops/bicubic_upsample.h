// bicubic_upsample: Keys' cubic kernel with a = -0.75 at (i + 0.5) * H / h - 0.5, taps clamped to the border,
// no antialiasing, as F.interpolate(mode="bicubic", align_corners=False) does. Any sizes, smaller outputs
// too. Backward is the transposed map, as a gather: each input gradient is summed by one thread in a fixed
// order.
#pragma once

#include "common/stream.h"
#include "ops/resample.h"

namespace var_ext {

// Check the contract; throw std::invalid_argument.
inline ResampleParams bicubic_upsample_params(const TensorView& x, const TensorView& out) {
    return resample_params("bicubic_upsample", "x", x, "out", out);
}
inline ResampleParams bicubic_upsample_backward_params(const TensorView& grad_out,
                                                       const TensorView& grad_in) {
    return resample_params("bicubic_upsample_backward", "grad_out", grad_out, "grad_in", grad_in);
}

}  // namespace var_ext

namespace var_ext::cpu {

void bicubic_upsample(const ResampleParams& p);
void bicubic_upsample_backward(const ResampleParams& p);  // in: grad_out, out: grad_in

}  // namespace var_ext::cpu

namespace var_ext::cuda {

void bicubic_upsample(const ResampleParams& p, const CudaStream& stream);
void bicubic_upsample_backward(const ResampleParams& p, const CudaStream& stream);

}  // namespace var_ext::cuda
