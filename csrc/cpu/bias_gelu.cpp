#include "cpu/bias_gelu.h"

#include <algorithm>

#include "common/buffer.h"
#include "common/cpu_features.h"
#include "common/pages.h"
#include "common/parallel.h"

namespace var_ext::cpu {

namespace {

int64_t parts(int64_t whole, int64_t part) {
    return (whole + part - 1) / part;
}

}  // namespace

void bias_gelu(const BiasGeluParams& p) {
    if (p.rows * p.channels == 0) return;
    const auto& kernel = VAR_EXT_SELECT(bias_gelu);
    prefer_huge_pages(p.out, p.rows * p.channels * dtype_size(p.dtype));
    const int64_t rows = parts(16 * 1024, p.channels), chunks = parts(p.rows, rows);
    parallel_for(thread_count(chunks, 2 * rows * p.channels), chunks, [&](int64_t chunk, int) {
        kernel.forward(p, chunk * rows, std::min(p.rows, (chunk + 1) * rows));
    });
}

void bias_gelu_backward(const BiasGeluParams& p) {
    const auto& kernel = VAR_EXT_SELECT(bias_gelu);
    prefer_huge_pages(p.out, p.rows * p.channels * dtype_size(p.dtype));
    // Chunks depend on the shape only, so the sums of the bias do not depend on the number of threads. There
    // are few of them, but none is so long that a sum of float32 would suffer.
    const int64_t least = parts(16 * 1024, std::max<int64_t>(1, p.channels));
    const int64_t rows = std::max(least, std::min<int64_t>(1024, parts(p.rows, 32)));
    const int64_t chunks = parts(p.rows, rows), padded = parts(p.channels, 16) * 16;
    const Buffer<float> sums = allocate<float>(std::max<int64_t>(1, chunks * padded));
    parallel_for(thread_count(chunks, 4 * rows * p.channels), chunks, [&](int64_t chunk, int) {
        kernel.backward(p, chunk * rows, std::min(p.rows, (chunk + 1) * rows), sums.get() + chunk * padded);
    });
    kernel.add_up(p, sums.get(), chunks, padded);
}

}  // namespace var_ext::cpu
