// When a kernel writes its outputs past the caches: a cache line that is overwritten as a whole need not be
// read first, a third of the traffic of a pass over memory.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/dtype.h"

namespace var_ext {

// Outputs of so many bytes. Measured with a 32 MiB share of last-level cache: at 6 and 8 MB the next op that
// reads them loses more than this one gains; from 11 MB on both together gain a tenth to a third.
constexpr int64_t streaming_bytes = 8 << 20;

// Whether every row of a tensor begins with a cache line: streaming stores need it.
inline bool begins_lines(const void* data, DType dtype, std::initializer_list<int64_t> strides) {
    uint64_t bits = reinterpret_cast<uint64_t>(data);
    for (int64_t stride : strides) bits |= static_cast<uint64_t>(stride * dtype_size(dtype));
    return bits % 64 == 0;
}

}  // namespace var_ext
