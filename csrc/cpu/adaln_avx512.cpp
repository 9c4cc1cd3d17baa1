#include "cpu/adaln_impl.h"

namespace var_ext::cpu {

const AdalnKernel adaln_avx512 = VAR_EXT_ADALN_KERNEL;

}  // namespace var_ext::cpu
