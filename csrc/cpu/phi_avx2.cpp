#include "cpu/phi_impl.h"

namespace var_ext::cpu {

const PhiKernel phi_avx2 = VAR_EXT_PHI_KERNEL(6);

}  // namespace var_ext::cpu
