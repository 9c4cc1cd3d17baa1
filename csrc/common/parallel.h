// Loops over independent items on the OpenMP pool that torch uses: torch.set_num_threads is obeyed.
// Every item is computed wholly by one thread, so results do not depend on how many there are.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace var_ext {

// Threads worth waking for `items` items of `cost` elementary steps each.
inline int thread_count(int64_t items, int64_t cost) {
#if defined(_OPENMP)
    constexpr int64_t grain = 64 * 1024;  // steps that outweigh waking a thread (a few microseconds)
    if (omp_in_parallel()) return 1;
    const int64_t useful = std::min(items, items * std::max<int64_t>(cost, 1) / grain);
    return static_cast<int>(std::clamp<int64_t>(useful, 1, omp_get_max_threads()));
#else
    static_cast<void>(items);
    static_cast<void>(cost);
    return 1;
#endif
}

// Calls body(item, thread) for item in [0, items) and thread in [0, threads). The body must not throw.
template <class Body>
void parallel_for(int threads, int64_t items, const Body& body) {
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (int64_t item = 0; item < items; ++item) body(item, omp_get_thread_num());
        return;
    }
#endif
    for (int64_t item = 0; item < items; ++item) body(item, 0);
}

}  // namespace var_ext
