#include "cpu/cross_entropy.h"

#include <algorithm>
#include <cmath>

#include "common/cpu_features.h"
#include "common/pages.h"
#include "common/parallel.h"

namespace var_ext::cpu {

namespace {

// Calls body(row) for all rows, a few at a time.
template <class Body>
void for_rows(const CrossEntropyParams& p, const Body& body) {
    const int64_t chunk = std::max<int64_t>(1, 64 * 1024 / p.classes), chunks = (p.rows + chunk - 1) / chunk;
    parallel_for(thread_count(chunks, 4 * chunk * p.classes), chunks, [&](int64_t i, int) {
        for (int64_t row = i * chunk; row < std::min(p.rows, (i + 1) * chunk); ++row) body(row);
    });
}

}  // namespace

void cross_entropy(const CrossEntropyParams& p) {
    const CrossEntropyKernel& kernel = VAR_EXT_SELECT(cross_entropy);
    for_rows(p, [&](int64_t row) {
        const float* logits = p.logits + row * p.classes;
        const LogitRow read = kernel.read(logits, p.classes);
        const float log = std::log(read.sum), target = read.largest - logits[p.targets[row]] + log;
        p.stats[2 * row] = read.largest;
        p.stats[2 * row + 1] = log;
        p.losses[row] = target;
        if (p.smoothing != 0) {
            const float mean = log - read.total / static_cast<float>(p.classes);
            p.losses[row] = (1 - p.smoothing) * target + p.smoothing * mean;
        }
    });
}

void cross_entropy_backward(const CrossEntropyParams& p) {
    const CrossEntropyKernel& kernel = VAR_EXT_SELECT(cross_entropy);
    prefer_huge_pages(p.grad_logits, p.rows * p.classes * static_cast<int64_t>(sizeof(float)));
    for_rows(p, [&](int64_t row) {
        float* out = p.grad_logits + row * p.classes;
        kernel.backward(p.logits + row * p.classes, p.classes, p.stats + 2 * row, p.grad[row],
                        p.smoothing / static_cast<float>(p.classes), out);
        out[p.targets[row]] -= (1 - p.smoothing) * p.grad[row];
    });
}

}  // namespace var_ext::cpu
