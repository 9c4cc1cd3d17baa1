// Attention backward for 16-bit elements, second part: the gradients of keys and values, with P, dS and delta
// as in attention_backward_dq.cuh:
//   dV = P^T dO,  dK = scale dS^T Q.
#pragma once

#include "cuda/attention_forward.cuh"

namespace var_ext::cuda {

// Four warps, each with M times 16 keys: their K, V, dK and dV stay in registers, queries stream past.
template <int D>
struct AttentionBackwardDkv {
    static constexpr int M = D == 128 ? 1 : 2;
    static constexpr int rows_of_warp = 16 * M, rows = attention_threads / 32 * rows_of_warp, queries = 64;
    static constexpr int blocks = D == 32 ? 3 : 2;  // on a multiprocessor
    // A pair of tiles of Q and dO; then another pair, where K and V are before they go to registers.
    static constexpr int pair = 2 * queries * D, shared_elements = pair + 2 * rows * D;
    static_assert(2 * rows * D >= pair && 2 * queries == attention_threads);
    // For 64 channels, registers are 8 short: the last 16 of V come from its tile, which nothing overwrites.
    static constexpr bool v_stays = D == 64;
    static_assert(!v_stays || rows * D >= pair);
    // and lse and delta, twice, and 16 bytes a key; those are where V was unless queries come there
    static constexpr bool v_is_free = rows * D >= pair;
    static constexpr int shared_bytes =
        shared_elements * 2 + 2 * attention_threads * 4 + (v_is_free ? 0 : rows * 16);

    // 16 bytes per key: the first query that sees it; for a warp's first key also what its epilogue needs.
    template <class T>
    static __device__ int32_t* of_key(T* place, int row) {
        return reinterpret_cast<int32_t*>(v_is_free ? element_at<D>(place, row, 0) : place + row * 8);
    }
};

// What a warp holds of its keys. In each 16-row part, a thread has rows lane / 4 and lane / 4 + 8.
template <class T, int D, int M>
struct KeyRows {
    uint32_t k[M][D / 16][4], v[M][D / 16][4];
    float dk[M][D / 8][4] = {}, dv[M][D / 8][4] = {};
    const T* v_tile;  // from the warp's first row on
    T* of_keys;       // see AttentionBackwardDkv::of_key
};

// products (M times 16, 16) = rows times rows [first, first + 16) of a tile.
template <int D, class T, int M>
__device__ void multiply_16(float (&products)[M][2][4], const uint32_t (&rows)[M][D / 16][4],
                            const ByColumns<D>& tile, int first) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        uint32_t b[4];
        load_b(b, tile, first, k);
        for (int m = 0; m < M; ++m) {
            ptx::mma_16816<T>(products[m][0], rows[m][k], b[0], b[1]);
            ptx::mma_16816<T>(products[m][1], rows[m][k], b[2], b[3]);
        }
    }
}

// sums += weights, rounded, times rows [first, first + 16) of a tile.
template <int D, class T, int M>
__device__ void accumulate_16(float (&sums)[M][D / 8][4], const float (&weights)[M][2][4],
                              const ByRows<D>& tile, int first) {
    uint32_t a[M][4];
    for (int m = 0; m < M; ++m) as_a<T>(a[m], weights[m][0], weights[m][1]);
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        load_b_transposed(b, tile, first, n);
        for (int m = 0; m < M; ++m) {
            ptx::mma_16816<T>(sums[m][2 * n], a[m], b[0], b[1]);
            ptx::mma_16816<T>(sums[m][2 * n + 1], a[m], b[2], b[3]);
        }
    }
}

// Adds the contribution of 16 queries from `at` on; grad_out lies `below` them in shared memory. On an
// edge tile, a key is seen by queries from the start of its scale on.
template <bool edge, class T, int D, int M>
__device__ void add_dkv(KeyRows<T, D, M>& rows, const ByColumns<D>& columns, const ByRows<D>& queries,
                        int below, const float* lse, const float* delta, float scale, int32_t at) {
    const int lane = static_cast<int>(threadIdx.x % 32), column = lane % 4 * 2;
    float p[M][2][4] = {}, ds[M][2][4] = {};
    multiply_16<D, T>(p, rows.k, columns, 0);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        for (int i = 0; i < 4; ++i) {
            const float base = lse[8 * n + column + i % 2] * log2_e;
            for (int m = 0; m < M; ++m) {
                p[m][n][i] = ptx::exp2_approx(p[m][n][i] * scale - base);
            }
        }
    }
    if constexpr (edge) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            for (int r = 0; r < 2; ++r) {
                const int key = 16 * m + 8 * r + lane / 4;
                const int32_t from = *AttentionBackwardDkv<D>::of_key(rows.of_keys, key) - at - column;
                for (int n = 0; n < 2; ++n) {
                    for (int i = 0; i < 2; ++i) {
                        const bool seen = 8 * n + i >= from;  // mask
                        if (!seen) p[m][n][2 * r + i] = 0.0f;
                    }
                }
            }
        }
    }
    accumulate_16<D, T>(rows.dv, p, queries, below);
    if constexpr (AttentionBackwardDkv<D>::v_stays) {
        const ByRows<D> values(rows.v_tile);
        for (int m = 0; m < M; ++m) load_a(rows.v[m][D / 16 - 1], values, 16 * m, D / 16 - 1);
    }
    multiply_16<D, T>(ds, rows.v, columns, below);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        for (int i = 0; i < 4; ++i) {
            const float base = delta[8 * n + column + i % 2];
            for (int m = 0; m < M; ++m) ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - base);
        }
    }
    accumulate_16<D, T>(rows.dk, ds, queries, 0);
}

// budget <32>: registers <= 168, shared <= 25600, blocks >= 3
// budget <64>: registers <= 255, shared <= 50176, blocks >= 2, on sm_86 >= 2
// budget <128>: registers <= 255, shared <= 67584, blocks >= 2
// sass: HMMA, LDSM, LDGSTS, MUFU.EX2, STG.E.128
template <class T, int D>
__global__ void __launch_bounds__(attention_threads, AttentionBackwardDkv<D>::blocks)
    attention_backward_dkv_kernel(const __grid_constant__ AttentionParams p,
                                  const __grid_constant__ AttentionGradients g,
                                  const __grid_constant__ BlockCausalKeyTiles tiles,
                                  const __grid_constant__ BlockOrder order) {
    ptx::wait_for_previous();
    using Shape = AttentionBackwardDkv<D>;
    constexpr int M = Shape::M;
    const BlockOrder::Place place = order.place(blockIdx.x);
    const Tile tile = tiles.tile(static_cast<int32_t>(place.rank));  // coarse keys are seen by most queries
    const uint32_t b = place.b, h = place.h;
    const int lane = static_cast<int>(threadIdx.x % 32), row = static_cast<int>(threadIdx.x / 32) * 16 * M;
    // Quarters of the tile are permuted on their way to shared memory, so that the place of a warp's rows
    // there follows from the thread alone, without a register.
    const int turn = fourth_of_warp(blockIdx.x, 0) * Shape::rows_of_warp;
    const int32_t first = tile.first + (row ^ turn),
                  end = tile.first + tile.rows;  // the warp's first, the block's end
    const int32_t length = static_cast<int32_t>(p.queries);

    T* const q_tiles = reinterpret_cast<T*>(ptx::shared_memory());
    T *const k_tile = q_tiles + Shape::pair, *const v_tile = k_tile + Shape::rows * D;
    float* const of_queries = reinterpret_cast<float*>(q_tiles + Shape::shared_elements);
    // Queries that do not exist are zeros and contribute zeros. The head's address is recomputed each time,
    // to save registers.
    const auto copy_queries = [&](uint32_t b, uint32_t h, int32_t at, int stage) {
        const bool of_lse = threadIdx.x < Shape::queries;  // one half of the threads; delta is the other's
        const float* const from = (of_lse ? p.lse : g.delta) + (b * p.heads + h) * p.queries;
        const int32_t query = at + static_cast<int32_t>(threadIdx.x % Shape::queries);
        const bool inside = query < length;  // mask
        ptx::cp_async_4(of_queries + stage * attention_threads + threadIdx.x, from + query, inside);
        const Rows<const T> q_rows = rows_of<const T>(p.q, b, h),
                            grad_rows = rows_of<const T>(g.grad_out, b, h);
        T* const q_tile = q_tiles + stage * Shape::pair;
        start_copy<D, Shape::queries, attention_threads>(q_tile, q_rows, at, length);
        start_copy<D, Shape::queries, attention_threads>(q_tile + Shape::pair / 2, grad_rows, at, length);
        ptx::cp_async_commit();
    };
    const int32_t begin = tile.keys;  // the first query that sees any of the keys
    start_copy<D, Shape::rows, attention_threads>(k_tile, rows_of<const T>(p.k, b, h), tile.first, end, turn);
    start_copy<D, Shape::rows, attention_threads>(v_tile, rows_of<const T>(p.v, b, h), tile.first, end, turn);
    copy_queries(b, h, begin, 0);

    // the least and the greatest first query over the warp's keys
    int32_t least = first < end ? begin : length, most = least;  // a warp without keys has nothing to do
    if (tile.mixed && first < end) {
        least = tiles.start_of_scale(first);
        most = tiles.start_of_scale(min(first + Shape::rows_of_warp, end) - 1);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    KeyRows<T, D, M> rows;
    rows.v_tile = v_tile + row * D;
    const ByRows<D> own(k_tile + row * D);
#pragma unroll
    for (int m = 0; m < M; ++m) {
        for (int k = 0; k < D / 16; ++k) {
            load_a(rows.k[m][k], own, 16 * m, k);
            load_a(rows.v[m][k], own, Shape::rows + 16 * m, k);
        }
    }
    __syncwarp();
    // V is in registers, up to its first channels
    T* const of_keys = Shape::v_is_free ? v_tile + row * D
                                        : reinterpret_cast<T*>(of_queries + 2 * attention_threads) + row * 8;
    rows.of_keys = of_keys;
    const bool of_warp = lane < 16 * M;  // mask
    if (of_warp) {
        const int32_t start = tile.mixed ? tiles.start_of_scale(min(first + lane, end - 1)) : begin;
        ptx::store_16(Shape::of_key(of_keys, lane),
                      make_uint4(static_cast<uint32_t>(start), static_cast<uint32_t>(first),
                                 static_cast<uint32_t>(end), place.head));
    }
    __syncthreads();

    const float scale = p.scale * log2_e;
    int stage = 0;
#pragma unroll 1
    for (int32_t at = begin; at < length; at += Shape::queries) {
        if (at + Shape::queries < length) {
            const uint32_t head = ptx::load_16(Shape::of_key(of_keys, 0)).w,
                           of_b = order.heads.quotient(head);
            copy_queries(of_b, head - of_b * order.heads.divisor, at + Shape::queries, 1 - stage);
        }
        const float* const lse = of_queries + stage * attention_threads;
#pragma unroll 1
        for (int i = 0; i < Shape::queries; i += 16) {
            const int32_t query = at + i;
            if (query >= length || query + 16 <= least) continue;
            ByColumns<D> columns(q_tiles);
            ByRows<D> queries(q_tiles);
            columns += stage * 2 * Shape::queries + i;
            queries += stage * 2 * Shape::queries + i;
            const float* const delta = lse + Shape::queries;
            if (query >= most) {
                add_dkv<false>(rows, columns, queries, Shape::queries, lse + i, delta + i, scale, query);
            } else {
                add_dkv<true>(rows, columns, queries, Shape::queries, lse + i, delta + i, scale, query);
            }
        }
        ptx::cp_async_wait<0>();
        __syncthreads();
        stage = 1 - stage;
    }

    // what was kept lies where V goes
    const uint4 kept = ptx::load_16(Shape::of_key(rows.of_keys, 0));
    const int32_t to = static_cast<int32_t>(kept.y), to_end = static_cast<int32_t>(kept.z);
    const uint32_t to_b = order.heads.quotient(kept.w), to_h = kept.w - to_b * order.heads.divisor;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; ++m) {
        store_sums_16<D>(k_tile + (row + 16 * m) * D, rows.dk[m], p.scale, p.scale);
        store_sums_16<D>(v_tile + (row + 16 * m) * D, rows.dv[m], 1.0f, 1.0f);
    }
    __syncwarp();
    write_rows<D, Shape::rows_of_warp>(rows_of<T>(g.dk, to_b, to_h), k_tile + row * D, to, to_end);
    write_rows<D, Shape::rows_of_warp>(rows_of<T>(g.dv, to_b, to_h), v_tile + row * D, to, to_end);
}

}  // namespace var_ext::cuda
