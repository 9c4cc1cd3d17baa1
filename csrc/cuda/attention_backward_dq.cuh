// Attention backward for 16-bit elements, first part: the gradient of the queries. Weights P are recomputed
// from the log-sum-exp; with delta = sum of dO * O over a row:
//   dS = P * (dO V^T - delta),  dQ = scale dS K.
// delta is kept for the second part.
#pragma once

#include "cuda/attention_forward.cuh"

namespace var_ext::cuda {

// As forward: four warps, each with M times 16 query rows. 128 channels leave registers only for M = 1.
template <int D>
struct AttentionBackwardDq {
    static constexpr int M = D == 128 ? 1 : 2;
    static constexpr int rows_of_warp = 16 * M, rows = attention_threads / 32 * rows_of_warp, keys = 64;
    static constexpr int blocks = 2;  // on a multiprocessor
    // A pair of tiles of keys and values; then another pair, where Q and dO are before they go to registers.
    static constexpr int pair = 2 * keys * D, shared_elements = pair + 2 * rows * D;
    static_assert(2 * rows * D >= pair);
    // and delta, later the keys that are seen, and what each warp keeps for its end
    static constexpr int kept = 4,
                         shared_bytes = shared_elements * 2 + (rows + attention_threads / 32 * kept) * 4;
};

// What a warp holds of its rows. In each 16-row part, a thread has rows lane / 4 and lane / 4 + 8.
template <int D, int M>
struct QueryRows {
    uint32_t q[M][D / 16][4], grad[M][D / 16][4];
    float dq[M][D / 8][4] = {};
    float lse[M][2], delta[M][2];  // lse to base 2
    const int32_t* limit;          // keys that a row sees, in shared memory to save registers
};

// products (M times 16, 32) = rows times rows [first, first + 32) of a tile. On an edge tile, rows from
// `end` on are not needed.
template <int D, bool edge, class T, int M>
__device__ void multiply_32(float (&products)[M][4][4], const uint32_t (&rows)[M][D / 16][4],
                            const ByColumns<D>& tile, int first, int end) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        if (edge && 16 * n >= end) break;
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            uint32_t b[4];
            load_b(b, tile, first + 16 * n, k);
            for (int m = 0; m < M; ++m) {
                ptx::mma_16816<T>(products[m][2 * n], rows[m][k], b[0], b[1]);
                ptx::mma_16816<T>(products[m][2 * n + 1], rows[m][k], b[2], b[3]);
            }
        }
    }
}

// Adds the contribution of 32 keys from `at` on; values lie `below` them in shared memory. On an edge tile,
// rows see only keys below their limit, and no row of the warp sees key `end` or later.
template <bool edge, class T, int D, int M>
__device__ void add_dq(QueryRows<D, M>& rows, const ByColumns<D>& columns, const ByRows<D>& keys, int below,
                       float scale, int32_t at, int32_t end) {
    float p[M][4][4] = {}, ds[M][4][4] = {};
    multiply_32<D, edge, T>(p, rows.q, columns, 0, end - at);
#pragma unroll
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < 4; ++n) {
            for (int i = 0; i < 4; ++i) {
                p[m][n][i] = ptx::exp2_approx(p[m][n][i] * scale - rows.lse[m][i / 2]);
            }
        }
    }
    multiply_32<D, edge, T>(ds, rows.grad, columns, below, end - at);
#pragma unroll
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < 4; ++n) {
            for (int i = 0; i < 4; ++i) ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - rows.delta[m][i / 2]);
        }
    }
    if constexpr (edge) {
        const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            for (int r = 0; r < 2; ++r) {
                const int32_t limit = rows.limit[16 * m + 8 * r + lane / 4] - at - lane % 4 * 2;
                for (int n = 0; n < 4; ++n) {
                    for (int i = 0; i < 2; ++i) {
                        const bool seen = 8 * n + i < limit;  // mask
                        if (!seen) ds[m][n][2 * r + i] = 0.0f;
                    }
                }
            }
        }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        if (edge && at + 16 * k >= end) break;
        uint32_t a[M][4];
        for (int m = 0; m < M; ++m) as_a<T>(a[m], ds[m][2 * k], ds[m][2 * k + 1]);
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            uint32_t b[4];
            load_b_transposed(b, keys, 16 * k, n);
            for (int m = 0; m < M; ++m) {
                ptx::mma_16816<T>(rows.dq[m][2 * n], a[m], b[0], b[1]);
                ptx::mma_16816<T>(rows.dq[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// A warp's part of delta: 16 bytes of O a lane, from device memory, times those of dO in its tile.
template <int D, int rows, class T>
struct DeltaOfRows {
    static constexpr int pieces = D / 8, step = 32 / pieces, steps = rows / step;
    uint4 out[steps];

    __device__ void load(Rows<const T> from, int32_t first, int32_t end) {
        const int lane = static_cast<int>(threadIdx.x % 32), row = lane / pieces;
        const T* source = from[first + row] + lane % pieces * 8;
#pragma unroll
        for (int i = 0; i < steps; ++i) {
            const bool inside = first + row + i * step < end;  // mask
            out[i] = make_uint4(0, 0, 0, 0);
            if (inside) out[i] = ptx::load_16(source);
            source += step * from.stride;
        }
    }
    // delta[i] for the ith row of the tile
    __device__ void store(float* delta, const T* grad_tile) const {
        const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
        for (int i = 0; i < steps; ++i) {
            const uint4 grad = ptx::load_16(piece_of_lane<D>(grad_tile, i));
            const uint32_t a[4] = {out[i].x, out[i].y, out[i].z, out[i].w},
                           b[4] = {grad.x, grad.y, grad.z, grad.w};
            float sum = 0.0f;
            for (int j = 0; j < 4; ++j) {
                const float2 x = unpack<T>(a[j]), y = unpack<T>(b[j]);
                sum += x.x * y.x + x.y * y.y;
            }
            for (int apart = pieces / 2; apart > 0; apart /= 2)
                sum += __shfl_xor_sync(0xffffffff, sum, apart);
            if (lane % pieces == 0) delta[i * step + lane / pieces] = sum;
        }
    }
};

// budget <32>: registers <= 184, shared <= 25152, blocks >= 2
// budget <64>: registers <= 255, shared <= 49728, blocks >= 2, on sm_86 >= 2
// budget <128>: registers <= 255, shared <= 65856, blocks >= 2
// sass: HMMA, LDSM, LDGSTS, MUFU.EX2, STG.E.128
template <class T, int D>
__global__ void __launch_bounds__(attention_threads, AttentionBackwardDq<D>::blocks)
    attention_backward_dq_kernel(const __grid_constant__ AttentionParams p,
                                 const __grid_constant__ AttentionGradients g,
                                 const __grid_constant__ BlockCausalTiles tiles,
                                 const __grid_constant__ BlockOrder order) {
    ptx::wait_for_previous();
    using Shape = AttentionBackwardDq<D>;
    constexpr int M = Shape::M;
    const BlockOrder::Place place = order.place(blockIdx.x);
    const Tile tile = tiles.tile(tiles.count() - 1 - static_cast<int32_t>(place.rank));
    const uint32_t b = place.b, h = place.h;
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int row = fourth_of_warp(blockIdx.x, warp) * Shape::rows_of_warp;
    const int32_t first = tile.first + row,
                  end = tile.first + tile.rows;  // the warp's first, the block's end
    const int64_t rows_before = static_cast<int64_t>(place.head) * p.queries;

    T* const kv_tiles = reinterpret_cast<T*>(ptx::shared_memory());
    T *const q_tile = kv_tiles + Shape::pair, *const grad_tile = q_tile + Shape::rows * D;
    float* const delta = reinterpret_cast<float*>(kv_tiles + Shape::shared_elements) + row;
    const Rows<const T> k_rows = rows_of<const T>(p.k, b, h), v_rows = rows_of<const T>(p.v, b, h);
    const auto copy_keys = [&](int32_t at, int stage) {
        T* const k_tile = kv_tiles + stage * Shape::pair;
        start_copy<D, Shape::keys, attention_threads>(k_tile, k_rows, at, tile.keys);
        start_copy<D, Shape::keys, attention_threads>(k_tile + Shape::pair / 2, v_rows, at, tile.keys);
        ptx::cp_async_commit();
    };
    start_copy<D, Shape::rows, attention_threads>(q_tile, rows_of<const T>(p.q, b, h), tile.first, end);
    start_copy<D, Shape::rows, attention_threads>(grad_tile, rows_of<const T>(g.grad_out, b, h), tile.first,
                                                  end);
    copy_keys(0, 0);
    DeltaOfRows<D, 16 * M, T> products;
    products.load(rows_of<const T>(p.out, b, h), first, end);

    QueryRows<D, M> rows;
    for (int m = 0; m < M; ++m) {
        for (int r = 0; r < 2; ++r) {
            const int32_t query = first + 16 * m + 8 * r + lane / 4;
            const bool inside = query < end;  // mask
            rows.lse[m][r] = inside ? p.lse[rows_before + query] * log2_e : INFINITY;
        }
    }
    int32_t* const of_warp = reinterpret_cast<int32_t*>(kv_tiles + Shape::shared_elements) + Shape::rows +
                             static_cast<int>(threadIdx.x / 32) * Shape::kept;
    if (lane == 0) {  // needed only at the end: saves registers
        ptx::store_16(of_warp, make_uint4(static_cast<uint32_t>(first), static_cast<uint32_t>(end), b, h));
    }
    int32_t least = first < end ? tile.keys : 0, most = least;  // a warp without rows has nothing to do
    if (tile.mixed && first < end) {
        least = tiles.end_of_scale(first);
        most = tiles.end_of_scale(min(first + Shape::rows_of_warp, end) - 1);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    products.store(delta, grad_tile + row * D);
    __syncwarp();
    const ByRows<D> own(q_tile + row * D);
#pragma unroll
    for (int m = 0; m < M; ++m) {
        for (int k = 0; k < D / 16; ++k) {
            load_a(rows.q[m][k], own, 16 * m, k);
            load_a(rows.grad[m][k], own, Shape::rows + 16 * m, k);
        }
        for (int r = 0; r < 2; ++r) rows.delta[m][r] = delta[16 * m + 8 * r + lane / 4];
    }
    const bool stores = lane < 16 * M && first + lane < end;  // mask
    if (stores) g.delta[rows_before + first + lane] = delta[lane];
    __syncwarp();
    // delta is in registers: its memory now holds the limits of the rows
    int32_t* const limit = reinterpret_cast<int32_t*>(delta);
    const bool has_row = lane < 16 * M;  // mask
    if (has_row) limit[lane] = tile.mixed ? tiles.end_of_scale(min(first + lane, end - 1)) : tile.keys;
    rows.limit = limit;
    __syncthreads();

    const float scale = p.scale * log2_e;
    int stage = 0;
#pragma unroll 1
    for (int32_t at = 0; at < tile.keys; at += Shape::keys) {
        if (at + Shape::keys < tile.keys) copy_keys(at + Shape::keys, 1 - stage);
#pragma unroll 1
        for (int32_t i = 0; i < Shape::keys; i += 32) {
            ByColumns<D> columns(kv_tiles);
            ByRows<D> keys(kv_tiles);
            columns += stage * 2 * Shape::keys + i;
            keys += stage * 2 * Shape::keys + i;
            if (at + i + 32 <= least) {
                add_dq<false, T>(rows, columns, keys, Shape::keys, scale, at + i, most);
            } else if (at + i < most) {
                add_dq<true, T>(rows, columns, keys, Shape::keys, scale, at + i, most);
            }
        }
        ptx::cp_async_wait<0>();
        __syncthreads();
        stage = 1 - stage;
    }

#pragma unroll
    for (int m = 0; m < M; ++m) store_sums_16<D>(q_tile + (row + 16 * m) * D, rows.dq[m], p.scale, p.scale);
    __syncwarp();
    const uint4 kept = ptx::load_16(of_warp);
    write_rows<D, Shape::rows_of_warp>(rows_of<T>(g.dq, kept.z, kept.w), q_tile + row * D,
                                       static_cast<int32_t>(kept.x), static_cast<int32_t>(kept.y));
}

}  // namespace var_ext::cuda
