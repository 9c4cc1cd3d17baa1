#include "cpu/bias_residual_impl.h"

namespace var_ext::cpu {

const BiasResidualKernel bias_residual_avx2 = VAR_EXT_BIAS_RESIDUAL_KERNEL;

}  // namespace var_ext::cpu
