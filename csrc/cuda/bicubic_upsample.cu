#include "ops/bicubic_upsample.h"

#include "cuda/resample_launch.cuh"

namespace var_ext::cuda {

void bicubic_upsample(const ResampleParams& p, const CudaStream& stream) {
    resample<Cubic>("bicubic_upsample", p, stream);
}

void bicubic_upsample_backward(const ResampleParams& p, const CudaStream& stream) {
    resample<CubicTransposed>("bicubic_upsample_backward", p, stream);
}

}  // namespace var_ext::cuda
