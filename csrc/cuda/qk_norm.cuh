// qk_norm as the first step of other kernels.
#pragma once

#include "common/stream.h"
#include "ops/qk_norm.h"

namespace var_ext::cuda {

// Whether all heads can be read and written 16 bytes a lane.
bool has_aligned_rows(const QkNormParams& p);

// One launch; errors name the given op.
void launch_qk_norm(const char* op, const QkNormParams& p, const CudaStream& stream);

}  // namespace var_ext::cuda
