// When a kernel writes its outputs past the caches: a cache line that will be overwritten as a whole need not
// be read first, a third of the traffic of a pass over memory.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/dtype.h"

namespace var_ext {

// Outputs of this many bytes leave the caches near the core before anyone reads them.
constexpr int64_t streaming_bytes = 4 << 20;

// Whether every row of a tensor begins with a cache line: streaming stores need it.
inline bool begins_lines(const void* data, DType dtype, std::initializer_list<int64_t> strides) {
    uint64_t bits = reinterpret_cast<uint64_t>(data);
    for (int64_t stride : strides) bits |= static_cast<uint64_t>(stride * dtype_size(dtype));
    return bits % 64 == 0;
}

}  // namespace var_ext
