// Attention forward for 16-bit elements: products on the tensor cores, softmax in float32 with its maximum
// and sum carried from one tile of keys to the next.
//
// Four warps, each with M times 16 query rows in registers. M = 2 halves the reads of shared memory per
// product, which would otherwise take as long as the product itself; M = 1 leaves more blocks to spread
// over the chip.
#pragma once

#include <cfloat>

#include "cuda/attention_operands.cuh"
#include "cuda/attention_tiles.cuh"

namespace var_ext::cuda {

constexpr int attention_threads = 128;

template <int D, int M>
struct AttentionForward {
    static constexpr int rows_of_warp = 16 * M, rows = attention_threads / 32 * rows_of_warp, keys = 64;
    static constexpr int shared_elements = (rows + 4 * keys) * D;  // queries, and keys and values twice
    static constexpr int blocks = M == 2 || D == 128 ? 2 : 3;      // on a multiprocessor
};

// A warp's running state: for each of its 16-row parts, rows lane / 4 and lane / 4 + 8.
template <int D, int M>
struct Softmax {
    float out[M][D / 8][4] = {};
    float max[M][2], sum[M][2] = {};

    __device__ Softmax() {
        for (int m = 0; m < M; ++m) max[m][0] = max[m][1] = -INFINITY;
    }

    // Turns the scores of 64 keys into weights and updates the state; `scale` in units of log 2.
    __device__ void add_scores(float (&s)[M][8][4], float scale) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float top = max[m][r];
                for (int n = 0; n < 8; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
                top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
                top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
                // Both products are rounded: an unchanged maximum then decays by exactly 1, where a fused
                // difference would leave the rounding error of one, once per tile. If all scores so far are
                // -inf, weights are 0, and no maximum is subtracted.
                const float base = top == -INFINITY ? 0.0f : __fmul_rn(top, scale);
                const float decay = ptx::exp2_approx(__fmul_rn(max[m][r], scale) - base);
                max[m][r] = top;
                sum[m][r] *= decay;
                for (int n = 0; n < D / 8; ++n) {
                    out[m][n][2 * r] *= decay;
                    out[m][n][2 * r + 1] *= decay;
                }
                for (int n = 0; n < 8; ++n) {
                    for (int i = 2 * r; i < 2 * r + 2; ++i) {
                        s[m][n][i] = ptx::exp2_approx(s[m][n][i] * scale - base);
                        sum[m][r] += s[m][n][i];
                    }
                }
            }
        }
    }
};

// Scores of 64 keys, their weights, and the sum of values. On an edge tile a row sees only the first `limit`
// keys, and no row of the warp sees more than `end`.
template <bool edge, class T, int D, int M>
__device__ void attend(Softmax<D, M>& state, const uint32_t (&q)[M][D / 16][4], const ByColumns<D>& keys,
                       const ByRows<D>& values, float scale, const int (&limit)[M][2], int end) {
    float s[M][8][4] = {};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        if (edge && 16 * n >= end) break;
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            uint32_t b[4];
            load_b(b, keys, 16 * n, k);
            for (int m = 0; m < M; ++m) {
                ptx::mma_16816<T>(s[m][2 * n], q[m][k], b[0], b[1]);
                ptx::mma_16816<T>(s[m][2 * n + 1], q[m][k], b[2], b[3]);
            }
        }
    }
    if constexpr (edge) {
        const int column = 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            for (int n = 0; n < 8; ++n) {
                for (int i = 0; i < 4; ++i) {
                    const bool seen = 8 * n + column + i % 2 < limit[m][i / 2];  // mask
                    if (!seen) s[m][n][i] = -INFINITY;
                }
            }
        }
    }
    state.add_scores(s, scale);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        if (edge && 16 * k >= end) break;
        uint32_t weights[M][4];
        for (int m = 0; m < M; ++m) as_a<T>(weights[m], s[m][2 * k], s[m][2 * k + 1]);
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            uint32_t b[4];
            load_b_transposed(b, values, 16 * k, n);
            for (int m = 0; m < M; ++m) {
                ptx::mma_16816<T>(state.out[m][2 * n], weights[m], b[0], b[1]);
                ptx::mma_16816<T>(state.out[m][2 * n + 1], weights[m], b[2], b[3]);
            }
        }
    }
}

// Queries as stored in memory. A replacement of this type may use the tiles of keys and values before they
// are loaded.
struct StoredQueries {
    template <int D, int rows, class T>
    __device__ void start(T* q_tile, T*, const AttentionParams& p, uint32_t b, uint32_t h,
                          const Tile& tile) const {
        start_copy<D, rows, attention_threads>(q_tile, rows_of<const T>(p.q, b, h), tile.first,
                                               tile.first + tile.rows);
    }
};

// One tile of keys and values is copied while the other is used: one barrier per tile.
// budget <32, 1>: registers <= 128, shared <= 20480, blocks >= 3
// budget <64, 1>: registers <= 168, shared <= 40960, blocks >= 3
// budget <32, 2>: registers <= 208, shared <= 24576, blocks >= 2
// budget <64, 2>: registers <= 255, shared <= 49152, blocks >= 2
// budget <128, 1>: registers <= 255, shared <= 81920, blocks >= 2
// sass: HMMA, LDSM, LDGSTS, MUFU.EX2, STG.E.128
template <class T, int D, int M, class Tiles, class Queries>
__global__ void __launch_bounds__(attention_threads, AttentionForward<D, M>::blocks)
    attention_forward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Tiles tiles,
                             const __grid_constant__ BlockOrder order,
                             const __grid_constant__ Queries queries) {
    ptx::wait_for_previous();
    using Shape = AttentionForward<D, M>;
    const BlockOrder::Place place = order.place(blockIdx.x);
    const Tile tile = tiles.tile(tiles.count() - 1 - static_cast<int32_t>(place.rank));
    const uint32_t b = place.b, h = place.h;
    const int lane = static_cast<int>(threadIdx.x % 32);
    // the warp's first, in the tile
    const int row = fourth_of_warp(blockIdx.x, static_cast<int>(threadIdx.x / 32)) * Shape::rows_of_warp;
    const int32_t first = tile.first + row, end = tile.first + tile.rows;

    T* const q_tile = reinterpret_cast<T*>(ptx::shared_memory());
    T* const kv_tiles = q_tile + Shape::rows * D;
    const Rows<const T> k_rows = rows_of<const T>(p.k, b, h), v_rows = rows_of<const T>(p.v, b, h);
    const auto copy_keys = [&](int32_t at, int stage) {
        T* const k_tile = kv_tiles + stage * 2 * Shape::keys * D;
        start_copy<D, Shape::keys, attention_threads>(k_tile, k_rows, at, tile.keys);
        start_copy<D, Shape::keys, attention_threads>(k_tile + Shape::keys * D, v_rows, at, tile.keys);
        ptx::cp_async_commit();
    };
    queries.template start<D, Shape::rows>(q_tile, kv_tiles, p, b, h, tile);
    copy_keys(0, 0);

    // keys that the first and the last row of the warp see
    int32_t least = first < end ? tile.keys : 0, most = least;  // a warp without rows has nothing to do
    if (tile.mixed && first < end) {
        least = tiles.end_of_scale(first);
        most = tiles.end_of_scale(min(first + Shape::rows_of_warp, end) - 1);
    }
    const float scale = fmaxf(fabsf(p.scale) * log2_e, FLT_MIN);  // not 0: 0 times -inf is NaN

    ptx::cp_async_wait<0>();
    __syncthreads();
    uint32_t q[M][D / 16][4];
    const ByRows<D> q_rows(q_tile + row * D);
    const uint32_t sign =
        p.scale < 0.0f ? 0x80008000u : 0u;  // the largest score must have the largest product
#pragma unroll
    for (int m = 0; m < M; ++m) {
        for (int k = 0; k < D / 16; ++k) {
            load_a(q[m][k], q_rows, 16 * m, k);
            for (int i = 0; i < 4; ++i) q[m][k][i] ^= sign;
        }
    }
    Softmax<D, M> state;
    int stage = 0;
#pragma unroll 1
    for (int32_t at = 0; at < tile.keys; at += Shape::keys) {
        if (at + Shape::keys < tile.keys) copy_keys(at + Shape::keys, 1 - stage);
        ByColumns<D> keys(kv_tiles);
        ByRows<D> values(kv_tiles + Shape::keys * D);
        keys += stage * 2 * Shape::keys;
        values += stage * 2 * Shape::keys;
        int limit[M][2] = {};  // computed for edge tiles only, to save registers
        if (at + Shape::keys <= least) {
            attend<false, T>(state, q, keys, values, scale, limit, Shape::keys);
        } else if (at < most) {
            for (int m = 0; m < M; ++m) {
                for (int r = 0; r < 2; ++r) {
                    const int32_t query = min(first + 16 * m + 8 * r + lane / 4, end - 1);
                    limit[m][r] = (tile.mixed ? tiles.end_of_scale(query) : tile.keys) - at;
                }
            }
            attend<true, T>(state, q, keys, values, scale, limit, most - at);
        }
        ptx::cp_async_wait<0>();
        __syncthreads();
        stage = 1 - stage;
    }

#pragma unroll
    for (int m = 0; m < M; ++m) {
        float factor[2];
        for (int r = 0; r < 2; ++r) {
            float sum = state.sum[m][r];
            sum += __shfl_xor_sync(0xffffffff, sum, 1);
            sum += __shfl_xor_sync(0xffffffff, sum, 2);
            factor[r] = 1.0f / sum;
            const int32_t query = first + 16 * m + 8 * r + lane / 4;
            const bool stores = p.lse != nullptr && lane % 4 == 0 && query < end;  // mask
            if (stores) {
                p.lse[static_cast<int64_t>(place.head) * p.queries + query] =
                    (__fmul_rn(state.max[m][r], scale) + log2f(sum)) * ln_2;
            }
        }
        store_sums_16<D>(q_tile + (row + 16 * m) * D, state.out[m], factor[0],
                         factor[1]);  // queries are in registers
    }
    __syncwarp();
    write_rows<D, Shape::rows_of_warp>(rows_of<T>(p.out, b, h), q_tile + row * D, first, end);
}

}  // namespace var_ext::cuda
