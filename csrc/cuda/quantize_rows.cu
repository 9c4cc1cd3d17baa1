// quantize_rows: a block per row; every byte moves once if a block can hold the row.
#include "ops/quantize_rows.h"

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "ops/quantize_rows_steps.h"

namespace var_ext::cuda {

namespace {

constexpr int quantize_rows_steps = 4;                // of 16 bytes, in flight per thread
constexpr unsigned quantize_rows_most_threads = 640;  // in a block that holds its row
constexpr unsigned quantize_rows_any_threads = 256;   // in one that does not
constexpr unsigned quantize_rows_shared = 32 * sizeof(uint32_t);

// The bits of |x| in float32.
__device__ uint32_t magnitude(float x) {
    return __float_as_uint(x) & 0x7fffffff;
}

// 128 and the nearest integer, in the lowest byte.
__device__ uint32_t shifted(float x, float inverse) {
    return __float_as_uint(__fadd_rn(__fmul_rn(x, inverse), quantize_shift));
}

// The largest over the block, for all of its threads.
__device__ uint32_t max_block(uint32_t value, uint32_t* shared) {
    const unsigned lane = threadIdx.x % 32;
    for (int distance = 16; distance > 0; distance /= 2) {
        value = max(value, __shfl_xor_sync(0xffffffff, value, distance));
    }
    if (lane == 0) shared[threadIdx.x / 32] = value;  // mask
    __syncthreads();
    const bool is_warp = lane < blockDim.x / 32;  // mask
    value = is_warp ? shared[lane] : 0;
    for (int distance = 16; distance > 0; distance /= 2) {
        value = max(value, __shfl_xor_sync(0xffffffff, value, distance));
    }
    return value;
}

// Rows that begin at multiples of 16 bytes and fit into a block.
// budget: registers <= 48, shared <= 128, blocks >= 2
// sass: LDG.E.128
// sass <float>: STG.E
// sass <__half>: STG.E.64
// sass <__nv_bfloat16>: STG.E.64
template <class T>
__global__ void __launch_bounds__(quantize_rows_most_threads, 2)
    quantize_rows_aligned_kernel(const QuantizeRowsParams p) {
    ptx::wait_for_previous();
    constexpr int N = per_lane<T>, steps = quantize_rows_steps;
    const T* const x = static_cast<const T*>(p.x) + blockIdx.x * p.x_stride;
    uint8_t* const q = p.q + blockIdx.x * p.channels;
    uint4 bits[steps] = {};
#pragma unroll
    for (int i = 0; i < steps; ++i) {  // all loads before their first use
        const int64_t column = static_cast<int64_t>(i * blockDim.x + threadIdx.x) * N;
        const bool inside = column < p.channels;  // mask
        if (inside) bits[i] = ptx::load_16(x + column);
    }
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < steps; ++i) {
        float values[N];
        widen_16<T>(bits[i], values);
        for (int j = 0; j < N; ++j) most = max(most, magnitude(values[j]));
    }
    const QuantizedRow to = quantized_row(max_block(most, reinterpret_cast<uint32_t*>(ptx::shared_memory())));
    if (threadIdx.x == 0) p.scale[blockIdx.x] = to.scale;
#pragma unroll
    for (int i = 0; i < steps; ++i) {
        const int64_t column = static_cast<int64_t>(i * blockDim.x + threadIdx.x) * N;
        float values[N];
        widen_16<T>(bits[i], values);
        uint32_t words[N / 4] = {};
        for (int j = 0; j < N; ++j) {
            const uint32_t byte = to.finite ? shifted(values[j], to.inverse) & 0xff : quantize_zero;
            words[j / 4] |= byte << j % 4 * 8;
        }
        const bool inside = column < p.channels;  // mask
        if (!inside) break;
        if constexpr (N == 8) {
            *reinterpret_cast<uint2*>(q + column) = make_uint2(words[0], words[1]);
        } else {
            *reinterpret_cast<uint32_t*>(q + column) = words[0];
        }
    }
}

// Any number of channels, any alignment: one element at a time, cached for the second pass.
// budget: registers <= 40, shared <= 128, blocks >= 6
template <class T>
__global__ void __launch_bounds__(quantize_rows_any_threads, 6)
    quantize_rows_any_kernel(const QuantizeRowsParams p) {
    ptx::wait_for_previous();
    const T* const x = static_cast<const T*>(p.x) + blockIdx.x * p.x_stride;
    uint8_t* const q = p.q + blockIdx.x * p.channels;
    uint32_t most = 0;
    for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) most = max(most, magnitude(widen(x[c])));
    const QuantizedRow to = quantized_row(max_block(most, reinterpret_cast<uint32_t*>(ptx::shared_memory())));
    if (threadIdx.x == 0) p.scale[blockIdx.x] = to.scale;
    for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
        q[c] = to.finite ? static_cast<uint8_t>(shifted(widen(x[c]), to.inverse)) : quantize_zero;
    }
}

// Can a block hold a row, reading 16 bytes at a time and writing as many elements?
bool is_aligned(const QuantizeRowsParams& p) {
    const int64_t step = 16 / dtype_size(p.dtype);
    return at_16_bytes(p.x) && reinterpret_cast<uintptr_t>(p.q) % static_cast<uintptr_t>(step) == 0 &&
           p.channels % step == 0 && (p.rows == 1 || p.x_stride % step == 0) &&
           p.channels <= step * quantize_rows_steps * quantize_rows_most_threads;
}

// Whole warps with so many elements per thread.
unsigned threads_of(int64_t channels, int64_t elements) {
    return static_cast<unsigned>((channels + 32 * elements - 1) / (32 * elements) * 32);
}

}  // namespace

void quantize_rows(const QuantizeRowsParams& p, const CudaStream& stream) {
    const char* op = "quantize_rows";
    const dim3 blocks(counted(op, "R", p.rows));
    if (p.rows == 0) return;
    for_element(p.dtype, [&](auto element) {
        using T = decltype(element);
        if (is_aligned(p)) {
            launch(op, stream, blocks, threads_of(p.channels, quantize_rows_steps * per_lane<T>),
                   quantize_rows_shared, quantize_rows_aligned_kernel<T>, p);
        } else {
            launch(op, stream, blocks, std::min(threads_of(p.channels, 1), quantize_rows_any_threads),
                   quantize_rows_shared, quantize_rows_any_kernel<T>, p);
        }
    });
}

}  // namespace var_ext::cuda
