#include "cpu/keyed_dropout.h"

#include <algorithm>

#include "common/cpu_features.h"
#include "common/pages.h"
#include "common/parallel.h"
#include "common/streaming.h"

namespace var_ext::cpu {

void keyed_dropout(const KeyedDropoutParams& p) {
    if (p.rows * p.size == 0) return;
    const auto& kernel = VAR_EXT_SELECT(keyed_dropout);
    const int64_t bytes = p.rows * p.size * dtype_size(p.dtype);
    const bool stream =
        bytes >= streaming_bytes && begins_lines(p.out, p.dtype, {p.size, p.size / p.channels});
    prefer_huge_pages(p.out, bytes);
    constexpr int64_t chunk = 16 * 1024;
    const int64_t chunks = (p.size + chunk - 1) / chunk, items = p.rows * chunks;
    parallel_for(thread_count(items, 4 * std::min(p.size, chunk)), items, [&](int64_t i, int) {
        const int64_t begin = i % chunks * chunk;
        kernel.run(p, i / chunks, begin, std::min(p.size, begin + chunk), stream);
    });
}

}  // namespace var_ext::cpu
