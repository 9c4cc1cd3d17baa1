// Attention backward in float32, in two launches: gradients of queries by tiles of queries, then those of
// keys and values by tiles of keys. Each sum has one owner and one order.
#pragma once

#include "cuda/attention_fp32.cuh"

namespace var_ext::cuda {

namespace fp32 {

template <class S>  // q, k, v, grad_out and weights
constexpr size_t backward_bytes =
    (2 * S::row_floats + 2 * S::column_floats + S::weight_floats) * sizeof(float);

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

// Writes g.delta as well, for the kernel after it. Keys are copied while values are used, and vice
// versa.
// budget <32, 4, 4>: registers <= 128, shared <= 50176, blocks >= 2, on sm_86 >= 2
// budget <64, 4, 4>: registers <= 128, shared <= 82944, blocks >= 2
// budget <128, 4, 4>: registers <= 168, shared <= 148480, blocks >= 1, on sm_86 >= 0
// budget <128, 3, 2>: registers <= 168, shared <= 91136, blocks >= 1
// sass: FFMA, LDGSTS, LDS.128
// sass <64>: STG.E.128
// sass <128>: STG.E.128
template <int D, int R, int J>
__global__ void __launch_bounds__(fp32::threads, D == 128 ? 1 : 2)
    attention_backward_q_fp32_kernel(const __grid_constant__ AttentionParams p,
                                     const __grid_constant__ AttentionGradients g,
                                     const __grid_constant__ BlockCausalTiles tiles,
                                     const __grid_constant__ BlockOrder order) {
    ptx::wait_for_previous();
    using namespace fp32;
    using S = Shape<D, R, J>;
    const BlockOrder::Place place = order.place(blockIdx.x);
    const Tile tile = tiles.tile(tiles.count() - 1 - static_cast<int32_t>(place.rank));
    const uint32_t b = place.b, h = place.h;

    float* const q_tile = reinterpret_cast<float*>(ptx::shared_memory());
    float* const grad_tile = q_tile + S::row_floats;
    float* const k_tile = grad_tile + S::row_floats;
    float* const v_tile = k_tile + S::column_floats;
    float* const weights = v_tile + S::column_floats;
    const Rows<const float> k_rows = rows_of<const float>(p.k, b, h),
                            v_rows = rows_of<const float>(p.v, b, h);
    const Rows<const float> grad_rows = rows_of<const float>(g.grad_out, b, h);
    start_copy<D, S::rows>(q_tile, rows_of<const float>(p.q, b, h), tile.first, tile.first + tile.rows);
    start_copy<D, S::rows>(grad_tile, grad_rows, tile.first, tile.first + tile.rows);
    start_copy<D, S::columns>(v_tile, v_rows, 0, tile.keys);

    // keys that the first and the last row of the warp see
    const int row = row_of_thread<R>(), last = tile.rows - 1;
    int32_t least = row_of_warp<R>() <= last ? tile.keys : 0,
            most = least;  // a warp without rows has no work
    if (tile.mixed && most > 0) {
        least = tiles.end_of_scale(tile.first + row_of_warp<R>());
        most = tiles.end_of_scale(tile.first + min(row_of_warp<R>() + 2 * R - 1, last));
    }
    float delta[R], lse[R] = {};
    for (int i = 0; i < R; ++i) {
        const int64_t query = static_cast<int64_t>(place.head) * p.queries + tile.first + row + i;
        const bool inside = row + i < tile.rows;  // mask
        delta[i] = delta_of<D>(grad_rows, rows_of<const float>(p.out, b, h), tile.first + row + i, inside);
        if (inside) {
            lse[i] = p.lse[query];
            if (column_of_thread() == 0) g.delta[query] = delta[i];
        }
    }

    float dq[R][columns<D>] = {};
#pragma unroll 1
    for (int32_t at = 0; at < tile.keys; at += S::columns) {
        float pull[R][J], s[R][J];
        ptx::cp_async_wait<0>();
        __syncthreads();
        start_copy<D, S::columns>(k_tile, k_rows, at, tile.keys);
        if (at < most) multiply_rows<D>(pull, grad_tile, v_tile);
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (at + S::columns < tile.keys)
            start_copy<D, S::columns>(v_tile, v_rows, at + S::columns, tile.keys);
        if (at < most) {
            multiply_rows<D>(s, q_tile, k_tile);
            for (int i = 0; i < R; ++i) {
                for (int j = 0; j < J; ++j) {
                    s[i][j] = exp2f((s[i][j] * p.scale - lse[i]) * log2_e) * (pull[i][j] - delta[i]);
                }
            }
            if (at + S::columns > least) {
                for (int i = 0; i < R; ++i) {
                    int32_t end = tile.keys;
                    if (tile.mixed) end = tiles.end_of_scale(tile.first + min(row + i, last));
                    for (int j = 0; j < J; ++j) {
                        const bool seen = at + column_of_thread() + 16 * j < end;  // mask
                        if (!seen) s[i][j] = 0.0f;
                    }
                }
            }
            store_weights(weights, s);
            __syncwarp();
            add_product<D, J>(dq, weights, k_tile, min(most - at, S::columns));
        }
    }
    float factor[R];
    for (int i = 0; i < R; ++i) factor[i] = p.scale;
    write_sums<D>(rows_of<float>(g.dq, b, h), dq, factor, tile.first, tile.rows);
}

// Rows of products are keys here, columns queries. Queries are copied while grad_out is used, and vice
// versa.
// budget <32, 4, 4>: registers <= 128, shared <= 50176, blocks >= 2, on sm_86 >= 2
// budget <64, 4, 4>: registers <= 128, shared <= 82944, blocks >= 2
// budget <128, 4, 4>: registers <= 168, shared <= 148480, blocks >= 1, on sm_86 >= 0
// budget <128, 3, 2>: registers <= 168, shared <= 91136, blocks >= 1
// sass: FFMA, LDGSTS, LDS.128
// sass <64>: STG.E.128
// sass <128>: STG.E.128
template <int D, int R, int J>
__global__ void __launch_bounds__(fp32::threads, D == 128 ? 1 : 2)
    attention_backward_kv_fp32_kernel(const __grid_constant__ AttentionParams p,
                                      const __grid_constant__ AttentionGradients g,
                                      const __grid_constant__ BlockCausalTiles tiles,
                                      const __grid_constant__ BlockOrder order) {
    ptx::wait_for_previous();
    using namespace fp32;
    using S = Shape<D, R, J>;
    const BlockOrder::Place place = order.place(blockIdx.x);
    const Tile tile = tiles.tile(static_cast<int32_t>(place.rank));  // the first tile is seen most
    const uint32_t b = place.b, h = place.h;

    float* const k_tile = reinterpret_cast<float*>(ptx::shared_memory());
    float* const v_tile = k_tile + S::row_floats;
    float* const q_tile = v_tile + S::row_floats;
    float* const grad_tile = q_tile + S::column_floats;
    float* const weights = grad_tile + S::column_floats;
    const Rows<const float> q_rows = rows_of<const float>(p.q, b, h);
    const Rows<const float> grad_rows = rows_of<const float>(g.grad_out, b, h);
    const int32_t end = static_cast<int32_t>(p.queries), begin = tiles.start_of_scale(tile.first);
    start_copy<D, S::rows>(k_tile, rows_of<const float>(p.k, b, h), tile.first, tile.first + tile.rows);
    start_copy<D, S::rows>(v_tile, rows_of<const float>(p.v, b, h), tile.first, tile.first + tile.rows);
    start_copy<D, S::columns>(grad_tile, grad_rows, begin, end);

    // the first queries that see the first and the last row of the warp
    const int row = row_of_thread<R>(), last = tile.rows - 1;
    const bool works = row_of_warp<R>() <= last;
    int32_t least = begin, most = begin;
    if (tile.mixed && works) {
        least = tiles.start_of_scale(tile.first + row_of_warp<R>());
        most = tiles.start_of_scale(tile.first + min(row_of_warp<R>() + 2 * R - 1, last));
    }
    const float* const all_lse = p.lse + static_cast<int64_t>(place.head) * p.queries;
    const float* const all_delta = g.delta + static_cast<int64_t>(place.head) * p.queries;

    float dk[R][columns<D>] = {}, dv[R][columns<D>] = {};
#pragma unroll 1
    for (int32_t at = begin; at < end; at += S::columns) {
        const bool busy = works && at + S::columns > least;
        const int count = min(end - at, S::columns);
        float pull[R][J], s[R][J];
        ptx::cp_async_wait<0>();
        __syncthreads();
        start_copy<D, S::columns>(q_tile, q_rows, at, end);
        if (busy) multiply_rows<D>(pull, v_tile, grad_tile);
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (busy) {
            multiply_rows<D>(s, k_tile, q_tile);
            for (int j = 0; j < J; ++j) {
                const int32_t query = at + column_of_thread() + 16 * j;
                float lse = 0.0f, delta = 0.0f;
                if (query < end) {  // mask
                    lse = all_lse[query];
                    delta = all_delta[query];
                }
                for (int i = 0; i < R; ++i) {
                    s[i][j] = exp2f((s[i][j] * p.scale - lse) * log2_e);
                    pull[i][j] = s[i][j] * (pull[i][j] - delta);
                }
            }
            if (at < most || at + S::columns > end) {
                for (int i = 0; i < R; ++i) {
                    int32_t start = begin;
                    if (tile.mixed) start = tiles.start_of_scale(tile.first + min(row + i, last));
                    for (int j = 0; j < J; ++j) {
                        const int32_t query = at + column_of_thread() + 16 * j;
                        const bool seen = query >= start && query < end;  // mask
                        if (!seen) s[i][j] = pull[i][j] = 0.0f;
                    }
                }
            }
            store_weights(weights, s);
            __syncwarp();
            add_product<D, J>(dv, weights, grad_tile, count);
        }
        __syncthreads();
        if (at + S::columns < end) start_copy<D, S::columns>(grad_tile, grad_rows, at + S::columns, end);
        if (busy) {
            store_weights(weights, pull);
            __syncwarp();
            add_product<D, J>(dk, weights, q_tile, count);
        }
    }
    float one[R], factor[R];
    for (int i = 0; i < R; ++i) {
        one[i] = 1.0f;
        factor[i] = p.scale;
    }
    write_sums<D>(rows_of<float>(g.dv, b, h), dv, one, tile.first, tile.rows);
    write_sums<D>(rows_of<float>(g.dk, b, h), dk, factor, tile.first, tile.rows);
}

template <int D, int R, int J>
void launch_attention_backward_fp32_of(const char* op, const BlockCausalAttentionBackwardParams& p,
                                       const CudaStream& stream) {
    using S = fp32::Shape<D, R, J>;
    const AttentionParams& attention = p.forward.attention;
    const BlockCausalTiles tiles = make_tiles(op, p.forward.lengths, S::rows);
    const BlockOrder order = make_order(op, attention, tiles.count());
    if (order.blocks() == 0) return;
    for (const auto kernel :
         {attention_backward_q_fp32_kernel<D, R, J>, attention_backward_kv_fp32_kernel<D, R, J>}) {
        launch(op, stream, dim3(order.blocks()), fp32::threads, fp32::backward_bytes<S>, kernel, attention,
               p.gradients, tiles, order);
    }
}

template <int D>
void launch_attention_backward_fp32(const BlockCausalAttentionBackwardParams& p, const CudaStream& stream) {
    constexpr const char* op = "block_causal_attention_backward";
    if constexpr (D == 128) {
        if (fp32::backward_bytes<fp32::Shape<D, 4, 4>> > most_shared(op, stream))
            return launch_attention_backward_fp32_of<D, 3, 2>(op, p, stream);
    }
    launch_attention_backward_fp32_of<D, 4, 4>(op, p, stream);
}

}  // namespace var_ext::cuda
