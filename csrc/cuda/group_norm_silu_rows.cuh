// group_norm_silu for channels-last maps: a thread has N neighbouring channels of every few pixels of a
// chunk.
#pragma once

#include "cuda/group_norm_silu_groups.cuh"

namespace var_ext::cuda {

// A block has a window of the channels, 256 N at most, and as many pixels at a time as it has threads for.
// Neighbouring threads read neighbouring memory, across pixels too.
template <int N>
struct PixelPlace {
    uint32_t columns, rows, row;  // in units of N channels; pixels at a time; this thread's
    uint32_t b, partial, window, channel, channels;
    PixelChunk chunk;
    int64_t offset;  // of the thread's channels in the chunk's first pixel
    __device__ PixelPlace(const GroupNormSiluParams& p, uint32_t windows)
        : b(blockIdx.x / windows / static_cast<uint32_t>(p.partials)),
          partial(blockIdx.x / windows % static_cast<uint32_t>(p.partials)),
          window(blockIdx.x % windows * group_norm_silu_threads * N),
          channels(static_cast<uint32_t>(p.channels)),
          chunk(p, partial, chunk_size(p)) {
        columns = min((channels - window) / N, group_norm_silu_threads);
        rows = group_norm_silu_threads / columns;
        row = threadIdx.x / columns;
        channel = window + threadIdx.x % columns * N;
        offset = (b * p.pixels + chunk.first) * p.channels + channel;
    }
    // Threads left over after assigning rows have no pixels.
    __device__ uint32_t first() const { return row < rows ? row : chunk.pixels; }
    // Pixels of a row.
    __device__ float count(uint32_t of_row) const {
        return of_row < chunk.pixels ? static_cast<float>((chunk.pixels - of_row + rows - 1) / rows) : 0.0f;
    }
};

// Calls body(values of x, of grad, offset in the chunk) for a thread's pixels; loads of `steps` pixels are
// issued before their first use. Without `Grad` the second values are zeros.
template <class T, int N, int steps, bool Grad, class Body>
__device__ void for_pixels(const GroupNormSiluParams& p, const PixelPlace<N>& place, const Body& body) {
    const T* const all_x = static_cast<const T*>(p.x) + place.offset;
    const T* const all_grad = Grad ? static_cast<const T*>(p.grad) + place.offset : nullptr;
#pragma unroll 1
    for (uint32_t first = place.first(); first < place.chunk.pixels; first += steps * place.rows) {
        Packed<T, N> x_bits[steps] = {}, grad_bits[steps] = {};
        for (int i = 0; i < steps; ++i) {
            const uint32_t pixel = first + i * place.rows, at = pixel * place.channels;
            const bool inside = pixel < place.chunk.pixels;  // mask
            if (inside) {
                x_bits[i] = load_packed<T, N>(all_x + at);
                if constexpr (Grad) grad_bits[i] = load_packed<T, N>(all_grad + at);
            }
        }
        for (int i = 0; i < steps; ++i) {
            const uint32_t pixel = first + i * place.rows;
            const bool inside = pixel < place.chunk.pixels;  // mask
            if (inside) {
                float x[N], grad[N];
                widen_packed<T, N>(x_bits[i], x);
                widen_packed<T, N>(grad_bits[i], grad);
                body(x, grad, pixel * place.channels);
            }
        }
    }
}

// Leaves two values of each thread's channels in shared memory, (2, rows, columns N); with a barrier.
template <int N>
__device__ float* share_pairs(const float (&first)[N], const float (&second)[N]) {
    float* const shared = reinterpret_cast<float*>(ptx::shared_memory());
    const bool turned = threadIdx.x / 4 % 2 == 1;
    store_sums(shared + threadIdx.x * N, first, turned);
    store_sums(shared + (group_norm_silu_threads + threadIdx.x) * N, second, turned);
    __syncthreads();
    return shared;
}

// Mean and sum of squares around it of each channel of a chunk: Welford's update in a thread, then over rows.
// budget: registers <= 80, shared <= 16384, blocks >= 3
// sass <8>: LDG.E.128
// sass <float, 4>: LDG.E.128
template <class T, int N>
__global__ void __launch_bounds__(group_norm_silu_threads, 3)
    group_norm_silu_row_moments_kernel(const GroupNormSiluParams p, uint32_t windows) {
    ptx::wait_for_previous();
    const PixelPlace<N> place(p, windows);
    float mean[N] = {}, square[N] = {}, count = 0.0f;
    for_pixels<T, N, 4, false>(p, place, [&](const float (&x)[N], const float (&)[N], uint32_t) {
        count += 1.0f;
        const float share = 1.0f / count;
        for (int i = 0; i < N; ++i) {
            const float off = x[i] - mean[i];
            mean[i] += off * share;
            square[i] += off * (x[i] - mean[i]);
        }
    });
    const float* const means = share_pairs(mean, square);
    const float* const squares = means + group_norm_silu_threads * N;
    const uint32_t width = place.columns * N;
    const float pixels = place.chunk.count();
    float2* const to = chunk_pairs(p, place.b, place.partial) + place.window;
#pragma unroll 1
    for (uint32_t c = threadIdx.x; c < width; c += group_norm_silu_threads) {
        float sum = 0.0f, total = 0.0f;
        for (uint32_t r = 0; r < place.rows; ++r) sum += place.count(r) * (means[r * width + c] - means[c]);
        const float all = pixels > 0.0f ? means[c] + sum / pixels : 0.0f;
        for (uint32_t r = 0; r < place.rows; ++r) {
            const float off = means[r * width + c] - all;
            total += squares[r * width + c] + place.count(r) * off * off;
        }
        to[c] = make_float2(all + input_bias_of<T>(p, place.window + c), total);
    }
}

// `adds_up`: whether to compute statistics from partial sums, or else read them from memory.
// budget: registers <= 80, shared <= 16384, blocks >= 3
// sass <8>: LDG.E.128, STG.E.128
// sass <float, 4>: LDG.E.128, STG.E.128
template <class T, int N>
__global__ void __launch_bounds__(group_norm_silu_threads, 3)
    group_norm_silu_rows_kernel(const GroupNormSiluParams p, uint32_t windows, bool adds_up) {
    ptx::wait_for_previous();
    const PixelPlace<N> place(p, windows);
    const float2* stats = stats_of(p, place.b);
    if (adds_up) stats = stats_of_chunks(p, place.b, place.partial == 0 && place.window == 0);
    T* const out = static_cast<T*>(p.out) + place.offset;
    Channel channels[N];
    for (int i = 0; i < N; ++i) {
        channels[i] = channel_of<T>(p, stats, place.channel + i);
        channels[i].weight *= channels[i].rstd;
        channels[i].rstd = 1.0f;
    }
    for_pixels<T, N, 4, false>(p, place, [&](const float (&x)[N], const float (&)[N], uint32_t at) {
        float y[N];
        for (int i = 0; i < N; ++i) y[i] = norm_silu<T>(x[i], channels[i]);
        store_packed<T, N>(out + at, y);
    });
}

// Sums of slope * normed x and of slope of each channel of a chunk.
// budget: registers <= 128, shared <= 16384, blocks >= 2
// sass <8>: LDG.E.128
// sass <float, 4>: LDG.E.128
template <class T, int N>
__global__ void __launch_bounds__(group_norm_silu_threads, 2)
    group_norm_silu_row_slopes_kernel(const GroupNormSiluParams p, uint32_t windows) {
    ptx::wait_for_previous();
    const PixelPlace<N> place(p, windows);
    Channel channels[N];
    for (int i = 0; i < N; ++i) channels[i] = channel_of<T>(p, stats_of(p, place.b), place.channel + i);
    float normed[N] = {}, plain[N] = {};
    for_pixels<T, N, 2, true>(p, place, [&](const float (&x)[N], const float (&grad)[N], uint32_t) {
        for (int i = 0; i < N; ++i) {
            const Slope s = slope_of<T>(x[i], grad[i], channels[i]);
            normed[i] += s.slope * s.normed;
            plain[i] += s.slope;
        }
    });
    const float* const sums = share_pairs(normed, plain);
    const uint32_t width = place.columns * N;
    float2* const to = chunk_pairs(p, place.b, place.partial) + place.window;
#pragma unroll 1
    for (uint32_t c = threadIdx.x; c < width; c += group_norm_silu_threads) {
        float2 total = {};
        for (uint32_t r = 0; r < place.rows; ++r) {
            total.x += sums[r * width + c];
            total.y += sums[group_norm_silu_threads * N + r * width + c];
        }
        to[c] = total;
    }
}

// budget: registers <= 128, shared <= 0, blocks >= 2
// sass <8>: LDG.E.128, STG.E.128
// sass <float, 4>: LDG.E.128, STG.E.128
template <class T, int N>
__global__ void __launch_bounds__(group_norm_silu_threads, 2)
    group_norm_silu_rows_backward_kernel(const GroupNormSiluParams p, uint32_t windows) {
    ptx::wait_for_previous();
    const PixelPlace<N> place(p, windows);
    T* const out = static_cast<T*>(p.out) + place.offset;
    Channel channels[N];
    float2 means[N];
    for (int i = 0; i < N; ++i) {
        channels[i] = channel_of<T>(p, stats_of(p, place.b), place.channel + i);
        means[i] = slope_means_of(p, place.b, place.channel + i);
    }
    for_pixels<T, N, 2, true>(p, place, [&](const float (&x)[N], const float (&grad)[N], uint32_t at) {
        float grad_x[N];
        for (int i = 0; i < N; ++i) {
            grad_x[i] = grad_x_of(slope_of<T>(x[i], grad[i], channels[i]), channels[i], means[i]);
        }
        store_packed<T, N>(out + at, grad_x);
    });
}

}  // namespace var_ext::cuda
