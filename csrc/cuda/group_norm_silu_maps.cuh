// group_norm_silu for contiguous maps: a block has a chunk of one channel's pixels, N of them a thread.
#pragma once

#include "cuda/group_norm_silu_common.cuh"

namespace var_ext::cuda {

struct MapPlace {
    uint32_t map, b, c, partial;
    PixelChunk chunk;
    int64_t offset;  // of the chunk
    __device__ explicit MapPlace(const GroupNormSiluParams& p)
        : map(blockIdx.x / static_cast<uint32_t>(p.partials)),
          b(map / static_cast<uint32_t>(p.channels)),
          c(map % static_cast<uint32_t>(p.channels)),
          partial(blockIdx.x % static_cast<uint32_t>(p.partials)),
          chunk(p, partial, chunk_size(p)),
          offset(map * p.pixels + chunk.first) {}
};

// Calls body(values of x, of grad, offset in the chunk) for a thread's pixels. Without `Grad` the second
// values are zeros.
template <class T, int N, bool Grad, class Body>
__device__ void for_map(const GroupNormSiluParams& p, const MapPlace& place, const Body& body) {
    const T* const all_x = static_cast<const T*>(p.x) + place.offset;
    const T* const all_grad = Grad ? static_cast<const T*>(p.grad) + place.offset : nullptr;
#pragma unroll 2
    for (uint32_t at = threadIdx.x * N; at < place.chunk.pixels; at += blockDim.x * N) {
        float x[N], grad[N] = {};
        widen_packed<T, N>(load_packed<T, N>(all_x + at), x);
        if constexpr (Grad) widen_packed<T, N>(load_packed<T, N>(all_grad + at), grad);
        body(x, grad, at);
    }
}

// Mean and sum of squares around it of a chunk: combined over N pixels, then a thread, then the block.
// budget: registers <= 64, shared <= 256, blocks >= 4
// sass <8>: LDG.E.128
// sass <float, 4>: LDG.E.128
template <class T, int N>
__global__ void __launch_bounds__(group_norm_silu_threads, 4)
    group_norm_silu_map_moments_kernel(const GroupNormSiluParams p) {
    ptx::wait_for_previous();
    const MapPlace place(p);
    float* const shared = reinterpret_cast<float*>(ptx::shared_memory());
    float mean = 0.0f, square = 0.0f, count = 0.0f;
    for_map<T, N, false>(p, place, [&](const float (&x)[N], const float (&)[N], uint32_t) {
        float own = 0.0f;
        for (int i = 0; i < N; ++i) own += x[i];
        own /= N;
        for (int i = 0; i < N; ++i) square += (x[i] - own) * (x[i] - own);
        const float before = count, off = own - mean;
        count += N;
        mean += off * (N / count);
        square += off * off * (before * (N / count));
    });
    const bool any = place.chunk.pixels > 0;  // mask
    float near = 0.0f;
    if (any) near = widen(static_cast<const T*>(p.x)[place.offset]);
    float sum[1] = {count * (mean - near)}, total[1];
    sum_block(sum, shared);
    const float all = any ? near + sum[0] / place.chunk.count() : 0.0f;
    total[0] = square + count * (mean - all) * (mean - all);
    sum_block(total, shared + 32);
    if (threadIdx.x == 0) {
        chunk_pairs(p, place.b, place.partial)[place.c] =
            make_float2(all + input_bias_of<T>(p, place.c), total[0]);
    }
}

// budget: registers <= 64, shared <= 0, blocks >= 4
// sass <8>: LDG.E.128, STG.E.128
// sass <float, 4>: LDG.E.128, STG.E.128
template <class T, int N>
__global__ void __launch_bounds__(group_norm_silu_threads, 4)
    group_norm_silu_maps_kernel(const GroupNormSiluParams p) {
    ptx::wait_for_previous();
    const MapPlace place(p);
    const Channel channel = channel_of<T>(p, stats_of(p, place.b), place.c);
    T* const out = static_cast<T*>(p.out) + place.offset;
    for_map<T, N, false>(p, place, [&](const float (&x)[N], const float (&)[N], uint32_t at) {
        float y[N];
        for (int i = 0; i < N; ++i) y[i] = norm_silu<T>(x[i], channel);
        store_packed<T, N>(out + at, y);
    });
}

// budget: registers <= 80, shared <= 256, blocks >= 3
// sass <8>: LDG.E.128
// sass <float, 4>: LDG.E.128
template <class T, int N>
__global__ void __launch_bounds__(group_norm_silu_threads, 3)
    group_norm_silu_map_slopes_kernel(const GroupNormSiluParams p) {
    ptx::wait_for_previous();
    const MapPlace place(p);
    const Channel channel = channel_of<T>(p, stats_of(p, place.b), place.c);
    float sums[2] = {};
    for_map<T, N, true>(p, place, [&](const float (&x)[N], const float (&grad)[N], uint32_t) {
        for (int i = 0; i < N; ++i) {
            const Slope s = slope_of<T>(x[i], grad[i], channel);
            sums[0] += s.slope * s.normed;
            sums[1] += s.slope;
        }
    });
    sum_block(sums, reinterpret_cast<float*>(ptx::shared_memory()));
    if (threadIdx.x == 0) chunk_pairs(p, place.b, place.partial)[place.c] = make_float2(sums[0], sums[1]);
}

// budget: registers <= 80, shared <= 0, blocks >= 3
// sass <8>: LDG.E.128, STG.E.128
// sass <float, 4>: LDG.E.128, STG.E.128
template <class T, int N>
__global__ void __launch_bounds__(group_norm_silu_threads, 3)
    group_norm_silu_maps_backward_kernel(const GroupNormSiluParams p) {
    ptx::wait_for_previous();
    const MapPlace place(p);
    const Channel channel = channel_of<T>(p, stats_of(p, place.b), place.c);
    const float2 means = slope_means_of(p, place.b, place.c);
    T* const out = static_cast<T*>(p.out) + place.offset;
    for_map<T, N, true>(p, place, [&](const float (&x)[N], const float (&grad)[N], uint32_t at) {
        float grad_x[N];
        for (int i = 0; i < N; ++i) {
            grad_x[i] = grad_x_of(slope_of<T>(x[i], grad[i], channel), channel, means);
        }
        store_packed<T, N>(out + at, grad_x);
    });
}

}  // namespace var_ext::cuda
