// What a variant of keyed_dropout offers to the entry. Plain functions and pointers only, see resample.h.
#pragma once

#include <cstdint>

#include "cpu/variants.h"
#include "ops/keyed_dropout.h"

namespace var_ext::cpu {

struct KeyedDropoutKernel {
    // Elements [begin, end) of a row, in the order of memory; `begin` is a multiple of 4. `stream`: writes
    // past the caches; then rows, maps and `begin` are at whole cache lines.
    void (*run)(const KeyedDropoutParams& p, int64_t row, int64_t begin, int64_t end, bool stream);
};

VAR_EXT_DECLARE_VARIANTS(KeyedDropoutKernel, keyed_dropout);

}  // namespace var_ext::cpu
