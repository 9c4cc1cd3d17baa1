// Attention in float32, without matrix instructions: tiles in shared memory, and the two products that
// forward and backward are made of. 256 threads share a product as 16 x 16, a warp has whole rows of it: what
// it writes for its own product needs no barrier of the block.
#pragma once

#include "cuda/attention_operands.cuh"
#include "cuda/attention_tiles.cuh"
#include "cuda/launch.cuh"

namespace var_ext::cuda::fp32 {

constexpr int threads = 256;

template <int D>
constexpr int columns = D / 16;  // of D, those of a thread

// A thread has R rows of a product next to each other, and of its columns its own and J - 1 more, 16 apart.
template <int R>
__device__ int row_of_thread() {
    return static_cast<int>(threadIdx.x / 16 * R);
}
template <int R>
__device__ int row_of_warp() {
    return static_cast<int>(threadIdx.x / 32 * 2 * R);
}
__device__ inline int column_of_thread() {
    return static_cast<int>(threadIdx.x % 16);
}

// Pitch of rows of weights: at the place of a thread's weights, a warp's two halves use different halves of
// the banks.
template <int R, int J>
constexpr int weight_stride = R % 2 == 0 ? 16 * J + 4 : 16 * J + (J % 2 == 0 ? 16 : 0);

// Heads of D, and products of so many rows and columns. 4 x 4 per thread makes the best use of
// loads; smaller products are for chips with less shared memory.
template <int D, int R, int J>
struct Shape {
    static constexpr int rows = 16 * R, columns = 16 * J;
    static constexpr int row_floats = rows * D, column_floats = columns * D;  // of tiles
    static constexpr int weight_floats = rows * weight_stride<R, J>;
    static_assert(R * weight_stride<R, J> % 32 == 16);
};

// Rows of D floats in pieces of 16 bytes, swizzled so that eight neighbouring rows hold the same piece in
// eight different groups of banks.
template <int D, class T>
__device__ T* piece_of(T* tile, int row, int piece) {
    return tile + ((row * D + row % 8 * 4) ^ piece * 4);
}

// Two floats or four.
template <int length>
__device__ void load_run(float* x, const float* from) {
    if constexpr (length == 4) {
        const uint4 bits = ptx::load_16(from);
        memcpy(x, &bits, 16);
    } else {
        const float2 pair = *reinterpret_cast<const float2*>(from);
        x[0] = pair.x;
        x[1] = pair.y;
    }
}

// All threads start to copy rows [first, first + rows) into a tile; those from `end` on become zeros, unread.
template <int D, int rows>
__device__ void start_copy(float* tile, Rows<const float> from, int32_t first, int32_t end) {
    constexpr int pieces = D / 4, step = threads / pieces;  // rows at a time
    static_assert(rows % step == 0 && step % 8 == 0);       // all of a thread's share a swizzle
    const int row = static_cast<int>(threadIdx.x) / pieces, piece = static_cast<int>(threadIdx.x) % pieces;
    float* const to = piece_of<D>(tile, row, piece);
    const float* source = from[first + row] + piece * 4;
#pragma unroll
    for (int i = 0; i < rows / step; ++i) {
        const bool inside = first + row + i * step < end;  // mask
        ptx::cp_async_16(to + i * step * D, source, inside);
        source += step * from.stride;
    }
    ptx::cp_async_commit();
}

// s[i][j] = row i of the thread in `a` times row column + 16 j in `b`.
template <int D, int R, int J>
__device__ void multiply_rows(float (&s)[R][J], const float* a, const float* b) {
    const int row = row_of_thread<R>(), column = column_of_thread();
    for (int i = 0; i < R; ++i) {
        for (int j = 0; j < J; ++j) s[i][j] = 0.0f;
    }
#pragma unroll 1
    for (int piece = 0; piece < D / 4; ++piece) {
        float x[R][4], y[J][4];
        for (int i = 0; i < R; ++i) load_run<4>(x[i], piece_of<D>(a, row + i, piece));
        for (int j = 0; j < J; ++j) load_run<4>(y[j], piece_of<D>(b, column + 16 * j, piece));
#pragma unroll
        for (int d = 0; d < 4; ++d) {
            for (int i = 0; i < R; ++i) {
                for (int j = 0; j < J; ++j) s[i][j] += x[i][d] * y[j][d];
            }
        }
    }
}

// The thread's columns of a row of D floats come in runs of four, or of two where D is 32: run n begins at
// run_column<D>(n).
template <int D>
constexpr int run = D == 32 ? 2 : 4;
template <int D>
__device__ int run_column(int n) {
    return run<D> * (column_of_thread() + 16 * n);
}
// sum[i] += the first `count` entries of row i of the thread in `weights` (rows, columns) times rows of
// `values`: the thread's columns of them. Counts by fours: entries beyond `count` must be zeros, or their
// rows.
template <int D, int J, int R>
__device__ void add_product(float (&sum)[R][columns<D>], const float* weights, const float* values,
                            int count) {
    const int row = row_of_thread<R>();
#pragma unroll 1
    for (int k = 0; k < count; k += 4) {
        float w[R][4];
        for (int i = 0; i < R; ++i) load_run<4>(w[i], weights + (row + i) * weight_stride<R, J> + k);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            float x[columns<D>];
            for (int r = 0; r < columns<D> / run<D>; ++r) {
                const int column = run_column<D>(r);
                load_run<run<D>>(x + r * run<D>, piece_of<D>(values, k + n, column / 4) + column % 4);
            }
            for (int i = 0; i < R; ++i) {
                for (int c = 0; c < columns<D>; ++c) sum[i][c] += w[i][n] * x[c];
            }
        }
    }
}

// Stores the thread's part of a product where add_product reads it.
template <int R, int J>
__device__ void store_weights(float* weights, const float (&s)[R][J]) {
    float* const to = weights + row_of_thread<R>() * weight_stride<R, J> + column_of_thread();
    for (int i = 0; i < R; ++i) {
        for (int j = 0; j < J; ++j) to[i * weight_stride<R, J> + 16 * j] = s[i][j];
    }
}

// Over the 16 threads that share rows.
__device__ inline float sum_row(float x) {
    for (int distance = 8; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffff, x, distance);
    return x;
}
__device__ inline float max_row(float x) {  // drops NaN
    for (int distance = 8; distance > 0; distance /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, distance));
    }
    return x;
}

// Writes the thread's columns of its rows, each times a factor; the tile has `rows` rows.
template <int D, int R>
__device__ void write_sums(Rows<float> to, const float (&sum)[R][columns<D>], const float (&factor)[R],
                           int32_t first, int32_t rows) {
    const int row = row_of_thread<R>();
    for (int i = 0; i < R; ++i) {
        const bool inside = row + i < rows;  // mask
        for (int r = 0; inside && r < columns<D> / run<D>; ++r) {
            float* const place = to[first + row + i] + run_column<D>(r);
            float x[run<D>];
            for (int c = 0; c < run<D>; ++c) x[c] = sum[i][r * run<D> + c] * factor[i];
            if constexpr (run<D> == 4) {
                uint4 bits;
                memcpy(&bits, x, 16);
                ptx::store_global_16(place, bits);
            } else {
                *reinterpret_cast<float2*>(place) = make_float2(x[0], x[1]);
            }
        }
    }
}

}  // namespace var_ext::cuda::fp32
