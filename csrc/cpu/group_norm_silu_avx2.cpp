#include "cpu/group_norm_silu_impl.h"

namespace var_ext::cpu {

const GroupNormSiluKernel group_norm_silu_avx2 = VAR_EXT_GROUP_NORM_SILU_KERNEL;

}  // namespace var_ext::cpu
