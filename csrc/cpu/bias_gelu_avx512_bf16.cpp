#include "cpu/bias_gelu_impl.h"

namespace var_ext::cpu {

const BiasGeluKernel bias_gelu_avx512_bf16 = VAR_EXT_BIAS_GELU_KERNEL;

}  // namespace var_ext::cpu
