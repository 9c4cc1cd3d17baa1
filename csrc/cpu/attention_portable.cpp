#include "cpu/attention_impl.h"

namespace var_ext::cpu {

const AttentionKernel attention_portable = {forward, backward};

}  // namespace var_ext::cpu
