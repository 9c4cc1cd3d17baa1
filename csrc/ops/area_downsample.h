// area_downsample: the mean over the window [floor(i * H / h), ceil((i + 1) * H / h)) of each axis, as
// torch's adaptive average pooling (F.interpolate mode="area") does. Any sizes, larger outputs too. Backward
// is the transposed map, as a gather: each input gradient is summed by one thread in a fixed order.
#pragma once

#include "common/stream.h"
#include "ops/resample.h"

namespace var_ext {

// Check the contract; throw std::invalid_argument.
inline ResampleParams area_downsample_params(const TensorView& x, const TensorView& out) {
    return resample_params("area_downsample", "x", x, "out", out);
}
inline ResampleParams area_downsample_backward_params(const TensorView& grad_out, const TensorView& grad_in) {
    return resample_params("area_downsample_backward", "grad_out", grad_out, "grad_in", grad_in);
}

}  // namespace var_ext

namespace var_ext::cpu {

void area_downsample(const ResampleParams& p);
void area_downsample_backward(const ResampleParams& p);  // in: grad_out, out: grad_in

}  // namespace var_ext::cpu

namespace var_ext::cuda {

void area_downsample(const ResampleParams& p, const CudaStream& stream);
void area_downsample_backward(const ResampleParams& p, const CudaStream& stream);

}  // namespace var_ext::cuda
