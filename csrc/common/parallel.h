// Loops over independent items on the OpenMP pool that torch uses: torch.set_num_threads is respected.
// One thread computes each item, so results do not depend on the number of threads.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace var_ext {

// 1, or the whole team if `items` items of `cost` elementary steps each are worth waking it: a team of
// another size than torch's would make libgomp stop and restart threads.
inline int thread_count(int64_t items, int64_t cost) {
#if defined(_OPENMP)
    constexpr int64_t grain = 64 * 1024;  // steps that outweigh waking a thread (a few microseconds)
    if (items > 1 && items * cost >= 2 * grain && !omp_in_parallel()) return omp_get_max_threads();
#else
    static_cast<void>(items);
    static_cast<void>(cost);
#endif
    return 1;
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
