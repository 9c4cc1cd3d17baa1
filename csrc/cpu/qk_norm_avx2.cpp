#include "cpu/qk_norm_impl.h"

namespace var_ext::cpu {

const QkNormKernel qk_norm_avx2 = VAR_EXT_QK_NORM_KERNEL;

}  // namespace var_ext::cpu
