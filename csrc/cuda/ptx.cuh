// All PTX of the project. tests/emulator/include/cuda/ptx.cuh has each function here in plain C++.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace var_ext::ptx {

// The dynamic shared memory of the block. Kernels have no other: one place to check.
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(1024) unsigned char block_memory[];
    return block_memory;
}

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Every kernel calls it first, in all threads, before any access to device memory: it waits until earlier
// kernels on the stream have ended and their writes are visible. A launch may start blocks while those still
// run; see launch.cuh. No kernel triggers the next one early.
__device__ inline void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// An address in shared memory for matrix loads: an integer, whose bits can be xored.
struct SharedAddress {
    uint32_t value;
    __device__ SharedAddress(const void* pointer) : value(shared_address(pointer)) {}
    __device__ SharedAddress& operator+=(uint32_t bytes) {
        value += bytes;
        return *this;
    }
    __device__ SharedAddress& operator^=(uint32_t bits) {
        value ^= bits;
        return *this;
    }
};

// threadIdx.x, reread: values derived from it do not stay in registers between two uses.
__device__ inline int thread_again() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

// 16 bytes at once; the address must be a multiple of 16.
__device__ inline uint4 load_16(const void* from) {
    return *static_cast<const uint4*>(from);
}
__device__ inline void store_16(void* to, uint4 value) {
    *static_cast<uint4*>(to) = value;
}

// The same in device memory, guaranteed one instruction: the compiler splits predicated stores in an
// unrolled loop into four of 4 bytes.
__device__ inline void store_global_16(void* to, uint4 value) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
}

// Starts to copy 16 bytes into shared memory, or zeros where `valid` is false; then `global` is not read.
__device__ inline void cp_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
// The same of 4 bytes.
__device__ inline void cp_async_4(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 4 : 0)
                 : "memory");
}
// Closes a group of copies.
__device__ inline void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `pending` of this thread's latest groups are in flight. Copies of other threads also
// need a barrier.
template <int pending>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane i names row i % 8 of matrix i / 8. From matrix j, lane i gets
// elements 2 (i % 4) and the next of row i / 4 in r[j].
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row.value)
                 : "memory");
}
// The same with each matrix transposed: elements 2 (i % 4) and the next of column i / 4.
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row.value)
                 : "memory");
}

// d += a b with a (16, 16) by rows, b (16, 8) by columns, sums in float32. With g = lane / 4, t = lane % 4:
// a[0] holds (g, 2t) and (g, 2t + 1), a[1] row g + 8, a[2] columns + 8, a[3] both; b0 holds (2t, g) and
// (2t + 1, g), b1 rows + 8; d[0], d[1] are (g, 2t) and (g, 2t + 1), d[2], d[3] row g + 8.
template <class T>
__device__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma_16816<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma_16816<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x to 2 units in the last place; subnormal results are zero.
__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x / y to 2 units in the last place.
__device__ inline float divide_approx(float x, float y) {
    float z;
    asm("div.full.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

}  // namespace var_ext::ptx
