// The first step of cached_attention where one block has all queries of a head: qk_norm of packed
// qkv.
#pragma once

#include "cuda/attention_forward.cuh"
#include "cuda/qk_norm_forward.cuh"

namespace var_ext::cuda {

// One head of qkv or of a result.
template <class T, class Pointer>
__device__ Rows<T> rows_of(const HeadsOf<Pointer>& heads, uint32_t b, uint32_t h) {
    return {static_cast<T*>(heads.data) + b * heads.b + h * heads.h, heads.l};
}

// Queries computed from packed qkv; new keys and values are written to the cache. The block must be the only
// one of its head.
struct PackedQueries {
    QkNormParams norm;

    // `room` temporarily holds as many rows of keys and of values. A thread reads only what it copied itself.
    template <int D, int rows, class T>
    __device__ void start(T* q_tile, T* room, const AttentionParams&, uint32_t b, uint32_t h,
                          const Tile& tile) const {
        constexpr int pieces = D / 8, step = attention_threads / pieces;
        constexpr int log_pieces = D == 32 ? 2 : D == 64 ? 3 : 4;
        start_copy<D, rows, attention_threads>(q_tile, rows_of<const T>(norm.qkv[0], b, h), 0, tile.rows);
        start_copy<D, rows, attention_threads>(room, rows_of<const T>(norm.qkv[1], b, h), 0, tile.rows);
        start_copy<D, rows, attention_threads>(room + rows * D, rows_of<const T>(norm.qkv[2], b, h), 0,
                                               tile.rows);
        ptx::cp_async_commit();

        const int thread = ptx::thread_again(), row = thread / pieces, piece = thread % pieces;
        const uint4 q_bias = ptx::load_16(elements<T>(norm.q_bias, h * norm.q_bias.h) + piece * 8);
        const uint4 v_bias = ptx::load_16(elements<T>(norm.v_bias, h * norm.v_bias.h) + piece * 8);
        const bool has_norm = norm.log_scale != nullptr;
        const float scale = has_norm ? scale_of<T>(norm, h) : 1.0f;
        T* place = element_at<D>(q_tile, row, piece);
        T* const new_k = rows_of<T>(norm.out[1], b, h)[row] + piece * 8;
        T* const new_v = rows_of<T>(norm.out[2], b, h)[row] + piece * 8;
        ptx::cp_async_wait<0>();
#pragma unroll 1
        for (int i = 0; i < tile.rows; i += step) {
            T *const k_place = place + (room - q_tile), *const v_place = k_place + rows * D;
            uint4 q = ptx::load_16(place), k = ptx::load_16(k_place), v = ptx::load_16(v_place);
            norm_lanes<T>(q, k, v, q_bias, v_bias, has_norm, scale, log_pieces);
            if (row + i < tile.rows) {  // mask
                ptx::store_16(place, q);
                ptx::store_16(new_k + i * norm.out[1].l, k);
                ptx::store_16(new_v + i * norm.out[2].l, v);
            }
            place += step * D;
        }
        // Later code reads the new rows from the cache.
        __syncthreads();
    }
};

}  // namespace var_ext::cuda
