#include "cpu/attention_impl.h"

namespace var_ext::cpu {

const AttentionKernel attention_avx512 = {forward, backward};

}  // namespace var_ext::cpu
