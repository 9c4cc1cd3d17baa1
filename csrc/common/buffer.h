// Scratch memory of a kernel, aligned for the widest vectors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace var_ext {

constexpr std::align_val_t buffer_alignment{64};  // a cache line, and the widest vector

struct ReleaseBuffer {
    void operator()(void* memory) const { ::operator delete(memory, buffer_alignment); }
};
template <class T>
using Buffer = std::unique_ptr<T, ReleaseBuffer>;

// `count` elements, not initialised. T must be trivial.
template <class T>
Buffer<T> allocate(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    return Buffer<T>(static_cast<T*>(::operator new(bytes, buffer_alignment)));
}

}  // namespace var_ext
