// What a variant of cross_entropy offers to the entry. Plain functions and pointers only, see resample.h.
#pragma once

#include <cstdint>

#include "cpu/variants.h"
#include "ops/cross_entropy.h"

namespace var_ext::cpu {

struct LogitRow {
    float largest, sum, total;  // sums of exp(logit - largest) and of logit - largest
};

struct CrossEntropyKernel {
    LogitRow (*read)(const float* logits, int64_t classes);
    // grad * (softmax - share) of every class.
    void (*backward)(const float* logits, int64_t classes, const float* stats, float grad, float share,
                     float* out);
};

VAR_EXT_DECLARE_VARIANTS(CrossEntropyKernel, cross_entropy);

}  // namespace var_ext::cpu
