#include "cpu/sample_tokens_impl.h"

namespace var_ext::cpu {

const SampleTokensKernel sample_tokens_avx512 = {sample_tokens_draw<float>, sample_tokens_draw<BFloat16>,
                                                 sample_tokens_draw<Float16>};

}  // namespace var_ext::cpu
