// Memory pages behind large results.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace var_ext {

// Asks for 2 MiB pages for memory that is about to be written for the first time. A fresh block of tens of
// MiB comes from the kernel page by page, and those faults cost as much as filling the block three times.
// Only whole huge pages inside the block are advised, so nothing else is affected; if the system refuses,
// nothing happens.
inline void prefer_huge_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 2 * 1024 * 1024;
    // smaller blocks come from the heap, whose pages are already mapped
    constexpr int64_t least = 32 * 1024 * 1024;
    if (bytes < least) return;
    const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
    const uintptr_t first = (address + page - 1) / page * page;
    const uintptr_t last = (address + static_cast<uintptr_t>(bytes)) / page * page;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    static_cast<void>(begin);
    static_cast<void>(bytes);
#endif
}

}  // namespace var_ext
