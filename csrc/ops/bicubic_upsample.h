// bicubic_upsample: Keys' cubic kernel with a = -0.75 at (i + 0.5) * H / h - 0.5, taps clamped to the border,
// no antialiasing, as F.interpolate(mode="bicubic", align_corners=False) does. Any sizes, smaller outputs
// too. Backward is the transposed map, as a gather: each input gradient is summed by one thread in a fixed
// order.
#pragma once

#include "cuda/stream.h"
#include "ops/resample.h"

namespace var_ext::cpu {

void bicubic_upsample(const ResampleParams& p);
void bicubic_upsample_backward(const ResampleParams& p);  // in: grad_out, out: grad_in

}  // namespace var_ext::cpu

namespace var_ext::cuda {

void bicubic_upsample(const ResampleParams& p, const CudaStream& stream);
void bicubic_upsample_backward(const ResampleParams& p, const CudaStream& stream);

}  // namespace var_ext::cuda
