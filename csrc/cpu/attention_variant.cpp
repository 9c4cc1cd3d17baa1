// The bodies of the attention kernels, compiled once for each variant.
#include "cpu/attention_backward.h"

namespace {

#if defined(__AVX512BF16__)
using BFloat16Kind = BFloat16Pairs;
#else
using BFloat16Kind = Floats;
#endif

void forward(const var_ext::cpu::AttentionTask& task) {
    switch (task.p->dtype) {
        case var_ext::DType::bfloat16:
            return attention_forward<BFloat16Kind, BFloat16>(task);
        case var_ext::DType::float16:
            return attention_forward<Floats, Float16>(task);
        default:
            return attention_forward<Floats, float>(task);
    }
}

void backward(const var_ext::cpu::AttentionTask& task) {
    switch (task.p->dtype) {
        case var_ext::DType::bfloat16:
            return attention_backward<BFloat16Kind, BFloat16>(task);
        case var_ext::DType::float16:
            return attention_backward<Floats, Float16>(task);
        default:
            return attention_backward<Floats, float>(task);
    }
}

}  // namespace

namespace var_ext::cpu {

VAR_EXT_DEFINE_VARIANT(AttentionKernel, attention) = {forward, backward};

}  // namespace var_ext::cpu
