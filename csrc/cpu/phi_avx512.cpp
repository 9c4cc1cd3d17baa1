#include "cpu/phi_impl.h"

namespace var_ext::cpu {

const PhiKernel phi_avx512 = VAR_EXT_PHI_KERNEL(8);

}  // namespace var_ext::cpu
