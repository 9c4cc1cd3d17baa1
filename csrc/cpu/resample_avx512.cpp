#include "cpu/resample_impl.h"

namespace var_ext::cpu {

const ResampleKernel resample_avx512 = VAR_EXT_RESAMPLE_KERNEL;

}  // namespace var_ext::cpu
