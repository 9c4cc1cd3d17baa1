#include "ops/area_downsample.h"

#include "cuda/resample_launch.cuh"

namespace var_ext::cuda {

void area_downsample(const ResampleParams& p, const CudaStream& stream) {
    resample<Mean>("area_downsample", p, stream);
}

void area_downsample_backward(const ResampleParams& p, const CudaStream& stream) {
    resample<AreaTransposed>("area_downsample_backward", p, stream);
}

}  // namespace var_ext::cuda
