// Attention backward in float32, in two launches: gradients of queries by tiles of queries, then those of
// keys and values by tiles of keys. Each sum has one owner and one order.
#pragma once

#include "cuda/attention_fp32.cuh"

namespace var_ext::cuda {

namespace fp32 {

template <int D>
constexpr int backward_floats = 4 * tile_floats<D> + weight_floats;  // q, k, v, grad_out and weights

// grad_out . out of a row, over the 16 threads that share it; zero where there is no row.
template <int D>
__device__ float delta_of(Rows<const float> grad, Rows<const float> out, int32_t row, bool inside) {
    float sum = 0.0f;
    for (int r = 0; inside && r < columns<D> / run<D>; ++r) {
        float x[run<D>], y[run<D>];
        load_run<run<D>>(x, grad[row] + run_column<D>(r));
        load_run<run<D>>(y, out[row] + run_column<D>(r));
        for (int c = 0; c < run<D>; ++c) sum += x[c] * y[c];
    }
    return sum_row(sum);
}

}  // namespace fp32

// Writes g.delta as well, for the kernel after it. Keys are on their way while values are in use, and the
// other way round.
// budget <32>: registers <= 128, shared <= 50176, blocks >= 2
// budget <64>: registers <= 128, shared <= 82944, blocks >= 2
// budget <128>: registers <= 168, shared <= 148480, blocks >= 1
// sass: FFMA, LDGSTS, LDS.128
template <int D>
__global__ void __launch_bounds__(fp32::threads, D == 128 ? 1 : 2)
    attention_backward_q_fp32_kernel(const __grid_constant__ AttentionParams p,
                                     const __grid_constant__ AttentionGradients g,
                                     const __grid_constant__ BlockCausalTiles tiles,
                                     const __grid_constant__ BlockOrder order) {
    using namespace fp32;
    const BlockOrder::Place place = order.place(blockIdx.x);
    const Tile tile = tiles.tile(tiles.count() - 1 - static_cast<int32_t>(place.rank));
    const uint32_t b = place.b, h = place.h;

    float* const q_tile = reinterpret_cast<float*>(ptx::shared_memory());
    float* const grad_tile = q_tile + tile_floats<D>;
    float* const k_tile = grad_tile + tile_floats<D>;
    float* const v_tile = k_tile + tile_floats<D>;
    float* const weights = v_tile + tile_floats<D>;
    const Rows<const float> k_rows = rows_of<const float>(p.k, b, h),
                            v_rows = rows_of<const float>(p.v, b, h);
    const Rows<const float> grad_rows = rows_of<const float>(g.grad_out, b, h);
    start_copy<D>(q_tile, rows_of<const float>(p.q, b, h), tile.first, tile.first + tile.rows);
    start_copy<D>(grad_tile, grad_rows, tile.first, tile.first + tile.rows);
    start_copy<D>(v_tile, v_rows, 0, tile.keys);

    // keys that the first and the last row of the warp see
    const int row = row_of_thread(), last = tile.rows - 1;
    int32_t least = row_of_warp() <= last ? tile.keys : 0, most = least;  // a warp without rows has no work
    if (tile.mixed && most > 0) {
        least = tiles.end_of_scale(tile.first + row_of_warp());
        most = tiles.end_of_scale(tile.first + min(row_of_warp() + 7, last));
    }
    float delta[4], lse[4] = {};
    for (int i = 0; i < 4; ++i) {
        const int64_t query = static_cast<int64_t>(place.head) * p.queries + tile.first + row + i;
        const bool inside = row + i < tile.rows;  // mask
        delta[i] = delta_of<D>(grad_rows, rows_of<const float>(p.out, b, h), tile.first + row + i, inside);
        if (inside) {
            lse[i] = p.lse[query];
            if (column_of_thread() == 0) g.delta[query] = delta[i];
        }
    }

    float dq[4][columns<D>] = {};
#pragma unroll 1
    for (int32_t at = 0; at < tile.keys; at += tile_rows) {
        float pull[4][4], s[4][4];
        ptx::cp_async_wait<0>();
        __syncthreads();
        start_copy<D>(k_tile, k_rows, at, tile.keys);
        if (at < most) multiply_rows<D>(pull, grad_tile, v_tile);
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (at + tile_rows < tile.keys) start_copy<D>(v_tile, v_rows, at + tile_rows, tile.keys);
        if (at < most) {
            multiply_rows<D>(s, q_tile, k_tile);
            for (int i = 0; i < 4; ++i) {
                for (int j = 0; j < 4; ++j) {
                    s[i][j] = exp2f((s[i][j] * p.scale - lse[i]) * log2_e) * (pull[i][j] - delta[i]);
                }
            }
            if (at + tile_rows > least) {
                for (int i = 0; i < 4; ++i) {
                    int32_t end = tile.keys;
                    if (tile.mixed) end = tiles.end_of_scale(tile.first + min(row + i, last));
                    for (int j = 0; j < 4; ++j) {
                        const bool seen = at + column_of_thread() + 16 * j < end;  // mask
                        if (!seen) s[i][j] = 0.0f;
                    }
                }
            }
            store_weights(weights, s);
            __syncwarp();
            add_product<D>(dq, weights, k_tile, min(most - at, tile_rows));
        }
    }
    const float factor[4] = {p.scale, p.scale, p.scale, p.scale};
    write_sums<D>(rows_of<float>(g.dq, b, h), dq, factor, tile.first, tile.rows);
}

// Rows of products are keys here, columns queries. Queries are on their way while grad_out is in use, and the
// other way round.
// budget <32>: registers <= 128, shared <= 50176, blocks >= 2
// budget <64>: registers <= 128, shared <= 82944, blocks >= 2
// budget <128>: registers <= 168, shared <= 148480, blocks >= 1
// sass: FFMA, LDGSTS, LDS.128
template <int D>
__global__ void __launch_bounds__(fp32::threads, D == 128 ? 1 : 2)
    attention_backward_kv_fp32_kernel(const __grid_constant__ AttentionParams p,
                                      const __grid_constant__ AttentionGradients g,
                                      const __grid_constant__ BlockCausalTiles tiles,
                                      const __grid_constant__ BlockOrder order) {
    using namespace fp32;
    const BlockOrder::Place place = order.place(blockIdx.x);
    const Tile tile = tiles.tile(static_cast<int32_t>(place.rank));  // the first tile is seen most
    const uint32_t b = place.b, h = place.h;

    float* const k_tile = reinterpret_cast<float*>(ptx::shared_memory());
    float* const v_tile = k_tile + tile_floats<D>;
    float* const q_tile = v_tile + tile_floats<D>;
    float* const grad_tile = q_tile + tile_floats<D>;
    float* const weights = grad_tile + tile_floats<D>;
    const Rows<const float> q_rows = rows_of<const float>(p.q, b, h);
    const Rows<const float> grad_rows = rows_of<const float>(g.grad_out, b, h);
    const int32_t end = static_cast<int32_t>(p.queries), begin = tiles.start_of_scale(tile.first);
    start_copy<D>(k_tile, rows_of<const float>(p.k, b, h), tile.first, tile.first + tile.rows);
    start_copy<D>(v_tile, rows_of<const float>(p.v, b, h), tile.first, tile.first + tile.rows);
    start_copy<D>(grad_tile, grad_rows, begin, end);

    // the first queries that see the first and the last row of the warp
    const int row = row_of_thread(), last = tile.rows - 1;
    const bool works = row_of_warp() <= last;
    int32_t least = begin, most = begin;
    if (tile.mixed && works) {
        least = tiles.start_of_scale(tile.first + row_of_warp());
        most = tiles.start_of_scale(tile.first + min(row_of_warp() + 7, last));
    }
    const float* const all_lse = p.lse + static_cast<int64_t>(place.head) * p.queries;
    const float* const all_delta = g.delta + static_cast<int64_t>(place.head) * p.queries;

    float dk[4][columns<D>] = {}, dv[4][columns<D>] = {};
#pragma unroll 1
    for (int32_t at = begin; at < end; at += tile_rows) {
        const bool busy = works && at + tile_rows > least;
        const int count = min(end - at, tile_rows);
        float pull[4][4], s[4][4];
        ptx::cp_async_wait<0>();
        __syncthreads();
        start_copy<D>(q_tile, q_rows, at, end);
        if (busy) multiply_rows<D>(pull, v_tile, grad_tile);
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (busy) {
            multiply_rows<D>(s, k_tile, q_tile);
            for (int j = 0; j < 4; ++j) {
                const int32_t query = at + column_of_thread() + 16 * j;
                float lse = 0.0f, delta = 0.0f;
                if (query < end) {  // mask
                    lse = all_lse[query];
                    delta = all_delta[query];
                }
                for (int i = 0; i < 4; ++i) {
                    s[i][j] = exp2f((s[i][j] * p.scale - lse) * log2_e);
                    pull[i][j] = s[i][j] * (pull[i][j] - delta);
                }
            }
            if (at < most || at + tile_rows > end) {
                for (int i = 0; i < 4; ++i) {
                    int32_t start = begin;
                    if (tile.mixed) start = tiles.start_of_scale(tile.first + min(row + i, last));
                    for (int j = 0; j < 4; ++j) {
                        const int32_t query = at + column_of_thread() + 16 * j;
                        const bool seen = query >= start && query < end;  // mask
                        if (!seen) s[i][j] = pull[i][j] = 0.0f;
                    }
                }
            }
            store_weights(weights, s);
            __syncwarp();
            add_product<D>(dv, weights, grad_tile, count);
        }
        __syncthreads();
        if (at + tile_rows < end) start_copy<D>(grad_tile, grad_rows, at + tile_rows, end);
        if (busy) {
            store_weights(weights, pull);
            __syncwarp();
            add_product<D>(dk, weights, q_tile, count);
        }
    }
    const float one[4] = {1.0f, 1.0f, 1.0f, 1.0f}, factor[4] = {p.scale, p.scale, p.scale, p.scale};
    write_sums<D>(rows_of<float>(g.dv, b, h), dv, one, tile.first, tile.rows);
    write_sums<D>(rows_of<float>(g.dk, b, h), dk, factor, tile.first, tile.rows);
}

template <int D>
void launch_attention_backward_fp32(const BlockCausalAttentionBackwardParams& p, const CudaStream& stream) {
    constexpr const char* op = "block_causal_attention_backward";
    const AttentionParams& attention = p.forward.attention;
    const BlockCausalTiles tiles = make_tiles(op, p.forward.lengths, fp32::tile_rows);
    const BlockOrder order = make_order(op, attention, tiles.count());
    if (order.blocks() == 0) return;
    for (const auto kernel : {attention_backward_q_fp32_kernel<D>, attention_backward_kv_fp32_kernel<D>}) {
        launch(op, stream, dim3(order.blocks()), fp32::threads, fp32::backward_floats<D> * sizeof(float),
               kernel, attention, p.gradients, tiles, order);
    }
}

}  // namespace var_ext::cuda
