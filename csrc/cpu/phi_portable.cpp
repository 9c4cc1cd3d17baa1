#include "cpu/phi_impl.h"

namespace var_ext::cpu {

const PhiKernel phi_portable = VAR_EXT_PHI_KERNEL(4);

}  // namespace var_ext::cpu
