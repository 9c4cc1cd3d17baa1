// Shared by kernels that work on rows: 16 bytes of elements at a time, sums over lanes, blocks and chunks.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "common/tensor_view.h"
#include "cuda/numeric.cuh"
#include "cuda/ptx.cuh"

namespace var_ext::cuda {

// Elements in 16 bytes: a lane's loads and stores.
template <class T>
constexpr int per_lane = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ void widen_16(uint4 bits, float (&to)[per_lane<T>]) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    if constexpr (sizeof(T) == 4) {
        memcpy(to, words, 16);
    } else {
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack<T>(words[i]);
            to[2 * i] = pair.x;
            to[2 * i + 1] = pair.y;
        }
    }
}

template <class T>
__device__ uint4 narrow_16(const float (&from)[per_lane<T>]) {
    uint32_t words[4];
    if constexpr (sizeof(T) == 4) {
        memcpy(words, from, 16);
    } else {
        for (int i = 0; i < 4; ++i) words[i] = pack<T>(from[2 * i], from[2 * i + 1]);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// N elements as they lie in memory: 16 bytes, or a single one if unaligned.
template <class T, int N>
using Packed = std::conditional_t<N == 1, T, uint4>;

template <class T, int N>
__device__ Packed<T, N> load_packed(const T* from) {
    if constexpr (N == 1) {
        return *from;
    } else {
        return ptx::load_16(from);
    }
}
template <class T, int N>
__device__ void widen_packed(Packed<T, N> bits, float (&to)[N]) {
    if constexpr (N == 1) {
        to[0] = widen(bits);
    } else {
        widen_16<T>(bits, to);
    }
}
template <class T, int N>
__device__ void store_packed(T* to, const float (&from)[N]) {
    if constexpr (N == 1) {
        *to = narrow<T>(from[0]);
    } else {
        ptx::store_global_16(to, narrow_16<T>(from));
    }
}

// Stores what a lane has summed up in float32, at a multiple of 16 bytes unless N is 1. Of 8 sums, lanes that
// are `turned` store the second four first: with lanes 4 to 7 of each 8 turned, eight lanes that are served
// together have no bank conflict in shared memory.
template <int N>
__device__ void store_sums(float* to, const float (&sums)[N], bool turned = false) {
    if constexpr (N == 1) {
        *to = sums[0];
    } else {
        constexpr int quads = N / 4;
        for (int i = 0; i < quads; ++i) {
            const bool second = quads == 2 && (i == 1) != turned;
            float quad[4];
            for (int j = 0; j < 4; ++j) quad[j] = second ? sums[N - 4 + j] : sums[j];
            uint4 bits;
            memcpy(&bits, quad, 16);
            ptx::store_16(to + (second ? 4 : 0), bits);
        }
    }
}

// Adds up each of the values over 2^log_lanes neighbouring lanes; all of them get the sums.
template <int N>
__device__ void sum_lanes(float (&values)[N], int log_lanes) {
    for (int distance = (1 << log_lanes) / 2; distance > 0; distance /= 2) {
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] += __shfl_xor_sync(0xffffffff, values[i], distance);
    }
}

// Adds up each of the values over the block; all threads get the sums. `shared` holds (N, 32) floats; before
// it is used again, all threads must have passed one more barrier.
template <int N>
__device__ void sum_block(float (&values)[N], float* shared) {
    const unsigned lane = threadIdx.x % 32;
    sum_lanes(values, 5);
    if (lane == 0) {  // mask
        for (int i = 0; i < N; ++i) shared[i * 32 + threadIdx.x / 32] = values[i];
    }
    __syncthreads();
    const bool is_warp = lane < blockDim.x / 32;  // mask
    for (int i = 0; i < N; ++i) values[i] = is_warp ? shared[i * 32 + lane] : 0.0f;
    sum_lanes(values, 5);
}

// Adds up `count` rows of floats, `stride` apart, in 32 neighbouring columns: a warp every sixteenth of them,
// then over the warps. `here`: whether the column that `first` points at is one; lane i of each warp has
// column i. The first warp gets the sums.
constexpr unsigned sum_columns_threads = 512, sum_columns_warps = sum_columns_threads / 32;
__device__ inline float sum_columns(const float* first, int64_t count, int64_t stride, bool here,
                                    float* shared) {
    float sum = 0.0f;
    if (here) {
#pragma unroll 4
        for (int64_t i = threadIdx.x / 32; i < count; i += sum_columns_warps) sum += first[i * stride];
    }
    shared[threadIdx.x] = sum;  // (warps, 32)
    __syncthreads();
    float total = 0.0f;
    if (threadIdx.x < 32) {  // mask
        for (unsigned w = 0; w < sum_columns_warps; ++w) total += shared[w * 32 + threadIdx.x];
    }
    return total;
}

// Kernels count in 32 bits, offsets have 64.
inline uint32_t counted(const char* op, const char* what, int64_t count) {
    constexpr int64_t limit = int64_t{1} << 31;
    if (count >= limit) {
        contract_error(op, std::string(what) + " must be below 2^31 on CUDA, got " + std::to_string(count));
    }
    return static_cast<uint32_t>(count);
}

constexpr uint32_t ceil_div(uint32_t count, uint32_t size) {
    return (count + size - 1) / size;
}

inline bool at_16_bytes(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace var_ext::cuda
