// Tiles of 16-bit elements in shared memory, and the operands of matrix instructions that come from them.
#pragma once

#include "cuda/numeric.cuh"
#include "cuda/ptx.cuh"
#include "ops/attention.h"

namespace var_ext::cuda {

// Rows of D elements in pieces of 16 bytes, swizzled so that eight neighbouring rows hold the same piece in
// eight different groups of banks: what a matrix load reads at once.
template <int D>
__device__ constexpr int piece_at(int row, int piece) {
    constexpr int pieces = D / 8;
    static_assert(pieces == 4 || pieces == 8 || pieces == 16);
    return row * pieces + (piece ^ (pieces == 4 ? row / 2 % 4 : row % 8));
}
template <int D, class T>
__device__ T* element_at(T* tile, int row, int piece) {
    return tile + piece_at<D>(row, piece) * 8;
}

// One head of a (B, L, H, D) tensor: row l begins at data + l * stride.
template <class T>
struct Rows {
    T* data;
    int64_t stride;
    __device__ T* operator[](int64_t row) const { return data + row * stride; }
};
template <class T>
__device__ Rows<T> rows_of(const AttentionHeads& heads, uint32_t b, uint32_t h) {
    return {static_cast<T*>(heads.data) + b * heads.stride_b + h * heads.stride_h, heads.stride_l};
}

// All threads start to copy rows [first, first + rows) into a tile; those from `end` on become zeros, unread.
// A thread's pieces are in one column, so one address in each memory is enough. Runs of rows are permuted by
// `turn`, a multiple of the rows copied at once: row first + i goes to i ^ turn.
template <int D, int rows, int threads, class T>
__device__ void start_copy(T* tile, Rows<const T> from, int32_t first, int32_t end, int turn = 0) {
    constexpr int pieces = D / 8, step = threads / pieces;
    static_assert(threads % pieces == 0 && rows % step == 0 && step % 8 == 0);
    const int thread = ptx::thread_again(), row = thread / pieces, piece = thread % pieces;
    T* const to = element_at<D>(tile, row, piece);
    const T* source = from[first + row] + piece * 8;
#pragma unroll
    for (int i = 0; i < rows; i += step) {
        const bool inside = first + row + i < end;  // mask
        ptx::cp_async_16(to + (i ^ turn) * D, source, inside);
        source += step * from.stride;
    }
}

// A thread's address in matrix loads: a row and a piece in the first 16 rows of a tile. Later rows are an
// addition away, other pieces an xor: tiles begin at multiples of their rows' size, and steps of 8
// rows leave the swizzle as it is.
template <int D>
struct Address {
    ptx::SharedAddress at;
    template <class T>
    __device__ Address(const T* tile, int row, int piece) : at(element_at<D>(tile, row, piece)) {}
    __device__ ptx::SharedAddress of(int rows, int pieces) const {
        ptx::SharedAddress moved = at;
        moved ^= static_cast<uint32_t>(pieces * 16);
        moved += static_cast<uint32_t>(rows * D * 2);
        return moved;
    }
    __device__ Address& operator+=(int rows) {
        at += static_cast<uint32_t>(rows * D * 2);
        return *this;
    }
};

// A, and B transposed: 16 rows by 16 elements.
template <int D>
struct ByRows : Address<D> {
    template <class T>
    __device__ explicit ByRows(const T* tile)
        : Address<D>(tile, static_cast<int>(threadIdx.x % 16), static_cast<int>(threadIdx.x % 32 / 16)) {}
};
// B: the same 16 by 16 with rows for columns.
template <int D>
struct ByColumns : Address<D> {
    template <class T>
    __device__ explicit ByColumns(const T* tile)
        : Address<D>(tile, static_cast<int>(threadIdx.x % 8 + threadIdx.x % 32 / 16 * 8),
                     static_cast<int>(threadIdx.x / 8 % 2)) {}
};

// A: rows [row, row + 16), elements [16 k, 16 k + 16).
template <int D>
__device__ void load_a(uint32_t (&a)[4], const ByRows<D>& tile, int row, int k) {
    ptx::ldmatrix_x4(a, tile.of(row, 2 * k));
}
// B of two products: columns are rows [row, row + 8) and [row + 8, row + 16) of the tile, the sum runs over
// elements [16 k, 16 k + 16). The first takes b[0], b[1], the second b[2], b[3].
template <int D>
__device__ void load_b(uint32_t (&b)[4], const ByColumns<D>& tile, int row, int k) {
    ptx::ldmatrix_x4(b, tile.of(row, 2 * k));
}
// B of two products, transposed: the sum runs over rows [row, row + 16) of the tile, columns are elements
// [16 n, 16 n + 8) and [16 n + 8, 16 n + 16).
template <int D>
__device__ void load_b_transposed(uint32_t (&b)[4], const ByRows<D>& tile, int row, int n) {
    ptx::ldmatrix_x4_trans(b, tile.of(row, 2 * n));
}

// 16 rows by 16 columns of sums, two products side by side, become an A: rounded to T.
template <class T>
__device__ void as_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack<T>(left[0], left[1]);
    a[1] = pack<T>(left[2], left[3]);
    a[2] = pack<T>(right[0], right[1]);
    a[3] = pack<T>(right[2], right[3]);
}

// A warp stores 16 rows of D sums, times a factor for rows lane / 4 and lane / 4 + 8, at a tile's start.
template <int D, class T>
__device__ void store_sums_16(T* tile, const float (&sums)[D / 8][4], float upper, float lower) {
    const int lane = static_cast<int>(threadIdx.x % 32), own = piece_at<D>(lane / 4, 0) * 8 + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
        T* const to = tile + (own ^ n * 8);
        *reinterpret_cast<uint32_t*>(to) = pack<T>(sums[n][0] * upper, sums[n][1] * upper);
        *reinterpret_cast<uint32_t*>(to + 8 * D) = pack<T>(sums[n][2] * lower, sums[n][3] * lower);
    }
}

// A warp passes over the rows of a tile, 16 bytes a lane: what a lane has at step i. That is row
// lane / pieces + 32 / pieces * i.
template <int D, class T>
__device__ T* piece_of_lane(T* tile, int i) {
    constexpr int pieces = D / 8, step = 32 / pieces;
    const int lane = static_cast<int>(threadIdx.x % 32), turn = D == 32 ? 0 : i * step % 8;
    return tile + (piece_at<D>(lane / pieces, lane % pieces) ^ turn) * 8 + i * step * D;
}

// A warp copies the first rows of a tile to `to`, where they are rows [first, first + rows); those from `end`
// on stay.
template <int D, int rows, class T>
__device__ void write_rows(Rows<T> to, const T* tile, int32_t first, int32_t end) {
    constexpr int pieces = D / 8, step = 32 / pieces;
    const int lane = static_cast<int>(threadIdx.x % 32), row = lane / pieces;
    T* target = to[first + row] + lane % pieces * 8;
#pragma unroll
    for (int i = 0; i < rows / step; ++i) {
        if (first + row + i * step < end) {  // mask
            ptx::store_16(target, ptx::load_16(piece_of_lane<D>(tile, i)));
        }
        target += step * to.stride;
    }
}

}  // namespace var_ext::cuda
