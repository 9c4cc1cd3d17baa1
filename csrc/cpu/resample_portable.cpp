#include "cpu/resample_impl.h"

namespace var_ext::cpu {

const ResampleKernel resample_portable = VAR_EXT_RESAMPLE_KERNEL;

}  // namespace var_ext::cpu
