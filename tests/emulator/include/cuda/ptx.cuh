// The twin of csrc/cuda/ptx.cuh: found first when the emulator is built, so the same kernels include it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "machine.h"

// Not inlined, so that the return address is the kernel's.
#define EMULATED_ACCESS inline __attribute__((noinline, no_sanitize("thread")))

namespace var_ext::ptx {

using emulator::shared_memory;

inline void wait_for_previous() {
    emulator::wait_for_previous();
}
inline int thread_again() {
    return static_cast<int>(threadIdx.x);
}

EMULATED_ACCESS uint4 load_16(const void* from) {
    uint4 value;
    emulator::read_bytes(&value, from, 16, __builtin_return_address(0));
    return value;
}
EMULATED_ACCESS void store_16(void* to, uint4 value) {
    emulator::write_bytes(to, &value, 16, __builtin_return_address(0));
}
EMULATED_ACCESS void store_global_16(void* to, uint4 value) {
    emulator::write_bytes(to, &value, 16, __builtin_return_address(0));
}

EMULATED_ACCESS void cp_async_16(void* shared, const void* global, bool valid) {
    emulator::copy_async(shared, valid ? global : nullptr, 16, __builtin_return_address(0));
}
EMULATED_ACCESS void cp_async_4(void* shared, const void* global, bool valid) {
    emulator::copy_async(shared, valid ? global : nullptr, 4, __builtin_return_address(0));
}
inline void cp_async_commit() {
    emulator::commit_copies();
}
template <int pending>
void cp_async_wait() {
    emulator::wait_copies(pending);
}

struct SharedAddress {
    uintptr_t value;
    SharedAddress(const void* pointer) : value(reinterpret_cast<uintptr_t>(pointer)) {}
    SharedAddress& operator+=(uint32_t bytes) {
        value += bytes;
        return *this;
    }
    SharedAddress& operator^=(uint32_t bits) {
        value ^= bits;
        return *this;
    }
};

inline void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row, EMULATOR_SITE) {
    emulator::LoadMatrix lane = {reinterpret_cast<const void*>(row.value), {}};
    emulator::warp_collective("ldmatrix_x4", 0xffffffff, {file, line}, &lane, emulator::load_matrix);
    for (int i = 0; i < 4; ++i) r[i] = lane.r[i];
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row, EMULATOR_SITE) {
    emulator::LoadMatrix lane = {reinterpret_cast<const void*>(row.value), {}};
    emulator::warp_collective("ldmatrix_x4_trans", 0xffffffff, {file, line}, &lane,
                              emulator::load_matrix_transposed);
    for (int i = 0; i < 4; ++i) r[i] = lane.r[i];
}

template <class T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATOR_SITE) {
    emulator::Multiply lane = {{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    constexpr bool bf16 = std::is_same_v<T, __nv_bfloat16>;
    static_assert(bf16 || std::is_same_v<T, __half>);
    emulator::warp_collective("mma_16816", 0xffffffff, {file, line}, &lane,
                              bf16 ? emulator::multiply_bf16 : emulator::multiply_fp16);
    for (int i = 0; i < 4; ++i) d[i] = lane.d[i];
}

inline float exp2_approx(float x) {
    const float y = std::exp2(x);
    return y < 1.17549435e-38f ? 0.0f : y;  // NaN stays
}

inline float divide_approx(float x, float y) {
    return x / y;
}

}  // namespace var_ext::ptx
