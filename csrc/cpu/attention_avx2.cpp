#include "cpu/attention_impl.h"

namespace var_ext::cpu {

const AttentionKernel attention_avx2 = {forward, backward};

}  // namespace var_ext::cpu
