// keyed_dropout: every byte moves once, and each word is hashed once where 16 bytes can be read.
#include "ops/keyed_dropout.h"

#include "common/splitmix64.h"
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace var_ext::cuda {

namespace {

constexpr unsigned keyed_dropout_threads = 256;
constexpr int keyed_dropout_steps = 4;  // in flight per thread
constexpr uint32_t keyed_dropout_chunk = keyed_dropout_threads * keyed_dropout_steps;

__device__ uint64_t word_at(const KeyedDropoutParams& p, uint32_t row, uint64_t i) {
    const uint64_t key = p.keys[row], first = p.counter[0], step = p.counter[1];
    return splitmix64(key + first + step * (i + 1));
}

// Not replaced where it is dropped: 0 times NaN stays NaN.
__device__ float dropped(const KeyedDropoutParams& p, float x, uint64_t word, uint32_t lane) {
    return x * (static_cast<int16_t>(word >> (16 * lane)) < p.threshold ? p.scale : 0.0f);
}

// `units`: of N elements of a row, of all rows together. Numbers of N at a time follow each other as they do.
// budget: registers <= 64, shared <= 0, blocks >= 4
// sass <8>: LDG.E.128, STG.E.128
// sass <float, 4>: LDG.E.128, STG.E.128
template <class T, int N>
__global__ void __launch_bounds__(keyed_dropout_threads, 4)
    keyed_dropout_kernel(const KeyedDropoutParams p, uint32_t units) {
    ptx::wait_for_previous();
    const uint32_t size = static_cast<uint32_t>(p.size / N);  // of a row
    const uint32_t first = blockIdx.x * keyed_dropout_chunk + threadIdx.x;
    Packed<T, N> bits[keyed_dropout_steps] = {};
#pragma unroll
    for (int i = 0; i < keyed_dropout_steps; ++i) {  // all loads before their first use
        const uint32_t unit = first + i * keyed_dropout_threads;
        const bool inside = unit < units;  // mask
        if (inside) bits[i] = load_packed<T, N>(static_cast<const T*>(p.x) + static_cast<int64_t>(unit) * N);
    }
#pragma unroll
    for (int i = 0; i < keyed_dropout_steps; ++i) {
        const uint32_t unit = first + i * keyed_dropout_threads;
        const bool inside = unit < units;  // mask
        if (!inside) continue;
        const uint32_t row = unit / size, place = unit % size;
        float x[N];
        widen_packed<T, N>(bits[i], x);
        if constexpr (N == 1) {
            const uint32_t channels = static_cast<uint32_t>(p.channels), pixels = size / channels;
            const uint32_t number = place % pixels * channels + place / pixels;
            x[0] = dropped(p, x[0], word_at(p, row, number / 4), number % 4);
        } else {
            for (int j = 0; j < N; j += 4) {
                const uint64_t word = word_at(p, row, (static_cast<uint64_t>(place) * N + j) / 4);
                for (int k = 0; k < 4; ++k) x[j + k] = dropped(p, x[j + k], word, k);
            }
        }
        store_packed<T, N>(static_cast<T*>(p.out) + static_cast<int64_t>(unit) * N, x);
    }
}

// `units`: of N pixels in four channels, whose lanes are those of N words; of all contiguous maps together.
// budget: registers <= 64, shared <= 0, blocks >= 4
// sass <8>: LDG.E.128, STG.E.128
// sass <float, 4>: LDG.E.128, STG.E.128
template <class T, int N>
__global__ void __launch_bounds__(keyed_dropout_threads, 4)
    keyed_dropout_maps_kernel(const KeyedDropoutParams p, uint32_t units) {
    ptx::wait_for_previous();
    const uint32_t unit = blockIdx.x * keyed_dropout_threads + threadIdx.x;
    const bool inside = unit < units;  // mask
    if (!inside) return;
    const int64_t pixels = p.size / p.channels;
    const uint32_t steps = static_cast<uint32_t>(pixels / N), fours = static_cast<uint32_t>(p.channels / 4);
    const uint32_t map = unit / steps;  // of rows, and four channels
    const int64_t pixel = static_cast<int64_t>(unit % steps) * N, offset = map * (4 * pixels) + pixel;
    uint4 bits[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) bits[k] = ptx::load_16(static_cast<const T*>(p.x) + offset + k * pixels);
    uint64_t words[N];
#pragma unroll
    for (int j = 0; j < N; ++j) words[j] = word_at(p, map / fours, (pixel + j) * fours + map % fours);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        float x[N];
        widen_16<T>(bits[k], x);
        for (int j = 0; j < N; ++j) x[j] = dropped(p, x[j], words[j], k);
        store_packed<T, N>(static_cast<T*>(p.out) + offset + k * pixels, x);
    }
}

template <class T, int N>
void launch_over(const KeyedDropoutParams& p, const CudaStream& stream) {
    const char* op = "keyed_dropout";
    const uint32_t units = counted(op, N == 1 ? "elements that do not lie at 16 bytes" : "units of 16 bytes",
                                   p.rows * p.size / N);
    launch(op, stream, dim3(ceil_div(units, keyed_dropout_chunk)), keyed_dropout_threads, 0,
           keyed_dropout_kernel<T, N>, p, units);
}

template <class T, int N>
void launch_over_maps(const KeyedDropoutParams& p, const CudaStream& stream) {
    const char* op = "keyed_dropout";
    const uint32_t units = counted(op, "units of 64 bytes", p.rows * p.size / (4 * N));
    launch(op, stream, dim3(ceil_div(units, keyed_dropout_threads)), keyed_dropout_threads, 0,
           keyed_dropout_maps_kernel<T, N>, p, units);
}

}  // namespace

void keyed_dropout(const KeyedDropoutParams& p, const CudaStream& stream) {
    if (p.rows * p.size == 0) return;
    for_element(p.dtype, [&](auto element) {
        using T = decltype(element);
        constexpr int N = per_lane<T>;
        const bool is_aligned = at_16_bytes(p.x) && at_16_bytes(p.out);
        if (is_aligned && p.channels == 1 && p.size % N == 0) {
            launch_over<T, N>(p, stream);
        } else if (is_aligned && p.channels % 4 == 0 && p.size / p.channels % N == 0) {
            launch_over_maps<T, N>(p, stream);
        } else {
            launch_over<T, 1>(p, stream);
        }
    });
}

}  // namespace var_ext::cuda
