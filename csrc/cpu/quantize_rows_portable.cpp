#include "cpu/quantize_rows_impl.h"

namespace var_ext::cpu {

const QuantizeRowsKernel quantize_rows_portable = VAR_EXT_QUANTIZE_ROWS_KERNEL;

}  // namespace var_ext::cpu
