// The kernels of area_downsample and bicubic_upsample, forward and backward. Sums have the same
// order as on the CPU, along x, then along y, in float32, or in float64 for float64.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/numeric.cuh"
#include "cuda/ptx.cuh"
#include "cuda/resample.cuh"
#include "ops/resample.h"

namespace var_ext::cuda {

constexpr int resample_threads = 256;
constexpr int resample_planes =
    8;  // whose sums a thread keeps side by side: weights are computed once for all
constexpr size_t resample_most_shared = 72 * 1024;

__device__ inline double widen(double x) {
    return x;
}
template <>
__device__ inline double narrow<double>(float x) = delete;

template <class T>
struct SumOf {
    using Type = float;
};
template <>
struct SumOf<double> {
    using Type = double;
};
template <class T>
__device__ T rounded(typename SumOf<T>::Type sum) {
    if constexpr (sizeof(T) == 8) {
        return sum;
    } else {
        return narrow<T>(sum);
    }
}

// Each map calls visit(input, weight) for the terms of output i of an axis n_in -> n_out, in order.
struct Cubic {
    template <class S, class Visit>
    __device__ static void visit_taps(int i, int n_in, int n_out, const Visit& visit) {
        const CubicTaps<S> taps = cubic_taps<S>(i, n_in, n_out);
#pragma unroll
        for (int k = 0; k < 4; ++k) visit(taps.index[k], taps.weight[k]);
    }
};
struct CubicTransposed {
    template <class S, class Visit>
    __device__ static void visit_taps(int i, int n_in, int n_out, const Visit& visit) {
        const Range range = cubic_outputs(i, n_out, n_in);
#pragma unroll 1
        for (int o = range.begin; o < range.end; ++o) {
            const CubicTaps<S> taps = cubic_taps<S>(o, n_out, n_in);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (taps.index[k] == i) visit(o, taps.weight[k]);  // mask
            }
        }
    }
};
struct AreaTransposed {
    template <class S, class Visit>
    __device__ static void visit_taps(int i, int n_in, int n_out, const Visit& visit) {
        const Range range = area_window(i, n_in, n_out);
#pragma unroll 1
        for (int o = range.begin; o < range.end; ++o) {
            const Range window = area_window(o, n_out, n_in);
            visit(o, S(1) / static_cast<S>(window.end - window.begin));
        }
    }
};

// The mean of a window of rows `step` apart, summed row by row as torch does.
template <class S, class Load>
__device__ S mean_of(Range rows, Range columns, const Load& load) {
    S sum = 0;
    for (int r = rows.begin; r < rows.end; ++r) {
#pragma unroll 4
        for (int c = columns.begin; c < columns.end; ++c) sum += load(r, c);
    }
    return sum / static_cast<S>(rows.end - rows.begin) / static_cast<S>(columns.end - columns.begin);
}

// Where plane (b, c) begins.
__device__ inline int64_t plane_offset(const int64_t (&strides)[4], int64_t plane, int64_t channels) {
    const int64_t b = plane / channels;
    return b * strides[0] + (plane - b * channels) * strides[1];
}
__device__ inline int64_t pixel_offset(const int64_t (&strides)[4], int row, int column) {
    return row * strides[2] + column * strides[3];
}

// Item `item` of (planes, pixels), or of (pixels, planes): whichever keeps neighbours adjacent in memory.
struct Item {
    int64_t plane;
    int pixel;
};
__device__ inline Item item_at(int64_t item, int64_t planes, int pixels, bool planes_last) {
    if (planes_last) {
        const int64_t pixel = item / planes;
        return {item - pixel * planes, static_cast<int>(pixel)};
    }
    const int64_t plane = item / pixels;
    return {plane, static_cast<int>(item - plane * pixels)};
}
__device__ inline bool planes_last(const int64_t (&strides)[4]) {
    return strides[1] < strides[3];
}

// Elements from one row or plane to the next in shared memory: odd, so that they begin in different banks.
__host__ __device__ inline int row_step(int width) {
    return width | 1;
}
__host__ __device__ inline int plane_step(int height, int row) {
    return height * row | 1;
}

// Reads a block's planes into shared memory, (planes, pixels); zeros stand for planes beyond the last.
template <class T, class S>
__device__ void read_planes(const ResampleParams& p, int64_t first, S* to) {
    const int width = static_cast<int>(p.in_w), pixels = static_cast<int>(p.in_h) * width;
    const int step = plane_step(static_cast<int>(p.in_h), row_step(width));
    const bool last = planes_last(p.in_strides);
    for (int i = static_cast<int>(threadIdx.x); i < resample_planes * pixels; i += resample_threads) {
        const Item item = item_at(i, resample_planes, pixels, last);
        const bool here = first + item.plane < p.batch * p.channels;  // mask
        const int row = item.pixel / width, column = item.pixel - row * width;
        S value = 0;
        if (here) {
            value =
                widen(static_cast<const T*>(p.in)[plane_offset(p.in_strides, first + item.plane, p.channels) +
                                                  pixel_offset(p.in_strides, row, column)]);
        }
        to[item.plane * step + row * row_step(width) + column] = value;
    }
}

// Sums of the weighted taps of one axis in each of the planes: tap i lies at from[i * tap_step].
template <class Map, class S>
__device__ void sum_taps(int output, int n_in, int n_out, const S* from, int tap_step, int step,
                         S (&sums)[resample_planes]) {
#pragma unroll
    for (int k = 0; k < resample_planes; ++k) sums[k] = 0;
    Map::template visit_taps<S>(output, n_in, n_out, [&](int input, S weight) {
#pragma unroll
        for (int k = 0; k < resample_planes; ++k) {
            sums[k] = add_product(sums[k], weight, from[k * step + input * tap_step]);
        }
    });
}

// Grids that fit in shared memory, eight planes a block: along x, then along y.
// budget: registers <= 96, shared <= 73728, blocks >= 2
template <class Map, class T>
__global__ void __launch_bounds__(resample_threads, 2) resample_grid_kernel(const ResampleParams p) {
    ptx::wait_for_previous();
    using S = typename SumOf<T>::Type;
    const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);
    const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w);
    const int pitch = row_step(in_w), step = plane_step(in_h, pitch), wide_step = plane_step(in_h, out_w);
    S* const packed = reinterpret_cast<S*>(ptx::shared_memory());  // (planes, in_h, pitch)
    S* const wide = packed + resample_planes * step;               // (planes, in_h, out_w)
    const int64_t first = static_cast<int64_t>(blockIdx.x) * resample_planes;

    read_planes<T>(p, first, packed);
    __syncthreads();
    S sums[resample_planes];
    for (int i = static_cast<int>(threadIdx.x); i < in_h * out_w; i += resample_threads) {
        const int row = i / out_w;
        sum_taps<Map>(i - row * out_w, in_w, out_w, packed + row * pitch, 1, step, sums);
#pragma unroll
        for (int k = 0; k < resample_planes; ++k) wide[k * wide_step + i] = sums[k];
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < out_h * out_w; i += resample_threads) {
        const int row = i / out_w, column = i - row * out_w;
        sum_taps<Map>(row, in_h, out_h, wide + column, out_w, wide_step, sums);
        T* const to = static_cast<T*>(p.out) + pixel_offset(p.out_strides, row, column);
#pragma unroll
        for (int k = 0; k < resample_planes; ++k) {
            const bool here = first + k < p.batch * p.channels;  // mask
            if (here) to[plane_offset(p.out_strides, first + k, p.channels)] = rounded<T>(sums[k]);
        }
    }
}

// The means of such grids.
// budget: registers <= 64, shared <= 73728, blocks >= 2
template <class T>
__global__ void __launch_bounds__(resample_threads, 2) resample_grid_mean_kernel(const ResampleParams p) {
    ptx::wait_for_previous();
    using S = typename SumOf<T>::Type;
    const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);
    const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w), pixels = out_h * out_w;
    const int pitch = row_step(in_w), step = plane_step(in_h, pitch);
    S* const packed = reinterpret_cast<S*>(ptx::shared_memory());  // (planes, in_h, pitch)
    const int64_t first = static_cast<int64_t>(blockIdx.x) * resample_planes;

    read_planes<T>(p, first, packed);
    __syncthreads();
    const bool last = planes_last(p.out_strides);
    for (int i = static_cast<int>(threadIdx.x); i < resample_planes * pixels; i += resample_threads) {
        const Item item = item_at(i, resample_planes, pixels, last);
        const bool here = first + item.plane < p.batch * p.channels;  // mask
        if (!here) continue;
        const int row = item.pixel / out_w, column = item.pixel - row * out_w;
        const S* const from = packed + item.plane * step;
        const S mean = mean_of<S>(area_window(row, in_h, out_h), area_window(column, in_w, out_w),
                                  [&](int r, int c) { return from[r * pitch + c]; });
        static_cast<T*>(p.out)[plane_offset(p.out_strides, first + item.plane, p.channels) +
                               pixel_offset(p.out_strides, row, column)] = rounded<T>(mean);
    }
}

// Larger grids, and without a map those that keep their size: a thread per output, directly from memory.
struct Mean {};
struct Copy {};
// budget: registers <= 64, shared <= 0, blocks >= 4
template <class Map, class T>
__global__ void __launch_bounds__(resample_threads, 4)
    resample_pixel_kernel(const ResampleParams p, int64_t items) {
    ptx::wait_for_previous();
    using S = typename SumOf<T>::Type;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * resample_threads + threadIdx.x;
    const bool here = i < items;  // mask
    if (!here) return;
    const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);
    const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w);
    const Item item = item_at(i, p.batch * p.channels, out_h * out_w, planes_last(p.out_strides));
    const int row = item.pixel / out_w, column = item.pixel - row * out_w;
    const T* const from = static_cast<const T*>(p.in) + plane_offset(p.in_strides, item.plane, p.channels);
    T* const to = static_cast<T*>(p.out) + plane_offset(p.out_strides, item.plane, p.channels) +
                  pixel_offset(p.out_strides, row, column);
    const auto load = [&](int r, int c) -> S { return widen(from[pixel_offset(p.in_strides, r, c)]); };
    if constexpr (std::is_same<Map, Copy>::value) {
        *to = from[pixel_offset(p.in_strides, row, column)];
    } else if constexpr (std::is_same<Map, Mean>::value) {
        *to = rounded<T>(mean_of<S>(area_window(row, in_h, out_h), area_window(column, in_w, out_w), load));
    } else {
        S sum = 0;
        Map::template visit_taps<S>(row, in_h, out_h, [&](int r, S of_row) {
            S along = 0;
            Map::template visit_taps<S>(column, in_w, out_w, [&](int c, S weight) {
                along = add_product(along, weight, load(r, c));
            });
            sum = add_product(sum, of_row, along);
        });
        *to = rounded<T>(sum);
    }
}

}  // namespace var_ext::cuda
