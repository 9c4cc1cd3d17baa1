// qk_norm for the kernels that begin with it.
#pragma once

#include "cuda/stream.h"
#include "ops/qk_norm.h"

namespace var_ext::cuda {

// Whether all heads can be read and written 16 bytes a lane.
bool has_aligned_rows(const QkNormParams& p);

// One launch, for an op that errors are to name.
void launch_qk_norm(const char* op, const QkNormParams& p, const CudaStream& stream);

}  // namespace var_ext::cuda
