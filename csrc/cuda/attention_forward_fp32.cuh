// Attention forward in float32: exact products, softmax with its maximum and sum carried from one tile of
// keys to the next.
#pragma once

#include "cuda/attention_fp32.cuh"

namespace var_ext::cuda {

namespace fp32 {

template <class S>  // q, k, v and weights
constexpr size_t forward_bytes = (S::row_floats + 2 * S::column_floats + S::weight_floats) * sizeof(float);

// A thread's running state for its rows: the maximum, and its columns' part of the sum.
template <int D, int R, int J>
struct SoftmaxOfRows {
    float out[R][columns<D>] = {};
    float max[R], sum[R] = {};

    __device__ SoftmaxOfRows() {
        for (int i = 0; i < R; ++i) max[i] = -INFINITY;
    }

    // Turns scores into weights and updates the state.
    __device__ void add_scores(float (&s)[R][J]) {
        for (int i = 0; i < R; ++i) {
            float top = max[i];
            for (int j = 0; j < J; ++j) top = fmaxf(top, s[i][j]);
            top = max_row(top);
            // all scores so far are -inf: weights are 0, and no maximum is subtracted
            const float base = top == -INFINITY ? 0.0f : top;
            const float decay = exp2f((max[i] - base) * log2_e);
            max[i] = top;
            sum[i] *= decay;
            for (int c = 0; c < columns<D>; ++c) out[i][c] *= decay;
            for (int j = 0; j < J; ++j) {
                s[i][j] = exp2f((s[i][j] - base) * log2_e);
                sum[i] += s[i][j];
            }
        }
    }
};

}  // namespace fp32

// Keys are copied while values are used, and vice versa.
// budget <32, 4, 4>: registers <= 128, shared <= 41984, blocks >= 2, on sm_86 >= 2
// budget <64, 4, 4>: registers <= 128, shared <= 66560, blocks >= 2
// budget <128, 4, 4>: registers <= 128, shared <= 115712, blocks >= 1, on sm_86 >= 0
// budget <128, 4, 3>: registers <= 128, shared <= 95232, blocks >= 1
// sass: FFMA, LDGSTS, LDS.128
// sass <64, 4>: STG.E.128
// sass <128, 4>: STG.E.128
template <int D, int R, int J, class Tiles>
__global__ void __launch_bounds__(fp32::threads, D == 128 ? 1 : 2)
    attention_forward_fp32_kernel(const __grid_constant__ AttentionParams p,
                                  const __grid_constant__ Tiles tiles,
                                  const __grid_constant__ BlockOrder order) {
    ptx::wait_for_previous();
    using namespace fp32;
    using S = Shape<D, R, J>;
    const BlockOrder::Place place = order.place(blockIdx.x);
    const Tile tile = tiles.tile(tiles.count() - 1 - static_cast<int32_t>(place.rank));
    const uint32_t b = place.b, h = place.h;

    float* const q_tile = reinterpret_cast<float*>(ptx::shared_memory());
    float* const k_tile = q_tile + S::row_floats;
    float* const v_tile = k_tile + S::column_floats;
    float* const weights = v_tile + S::column_floats;
    const Rows<const float> k_rows = rows_of<const float>(p.k, b, h),
                            v_rows = rows_of<const float>(p.v, b, h);
    start_copy<D, S::rows>(q_tile, rows_of<const float>(p.q, b, h), tile.first, tile.first + tile.rows);
    start_copy<D, S::columns>(k_tile, k_rows, 0, tile.keys);

    // keys that the first and the last row of the warp see
    const int row = row_of_thread<R>(), last = tile.rows - 1;
    int32_t least = row_of_warp<R>() <= last ? tile.keys : 0,
            most = least;  // a warp without rows has no work
    if (tile.mixed && most > 0) {
        least = tiles.end_of_scale(tile.first + row_of_warp<R>());
        most = tiles.end_of_scale(tile.first + min(row_of_warp<R>() + 2 * R - 1, last));
    }

    SoftmaxOfRows<D, R, J> state;
#pragma unroll 1
    for (int32_t at = 0; at < tile.keys; at += S::columns) {
        ptx::cp_async_wait<0>();
        __syncthreads();
        start_copy<D, S::columns>(v_tile, v_rows, at, tile.keys);
        if (at < most) {
            float s[R][J];
            multiply_rows<D>(s, q_tile, k_tile);
            for (int i = 0; i < R; ++i) {
                for (int j = 0; j < J; ++j) s[i][j] *= p.scale;
            }
            if (at + S::columns > least) {
                for (int i = 0; i < R; ++i) {
                    int32_t end = tile.keys;
                    if (tile.mixed) end = tiles.end_of_scale(tile.first + min(row + i, last));
                    for (int j = 0; j < J; ++j) {
                        const bool seen = at + column_of_thread() + 16 * j < end;  // mask
                        if (!seen) s[i][j] = -INFINITY;
                    }
                }
            }
            state.add_scores(s);
            store_weights(weights, s);
        }
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (at + S::columns < tile.keys)
            start_copy<D, S::columns>(k_tile, k_rows, at + S::columns, tile.keys);
        if (at < most) add_product<D, J>(state.out, weights, v_tile, min(most - at, S::columns));
    }

    float factor[R];
    for (int i = 0; i < R; ++i) {
        const float sum = sum_row(state.sum[i]);
        factor[i] = 1.0f / sum;
        const bool stores = p.lse != nullptr && column_of_thread() == 0 && row + i < tile.rows;  // mask
        if (stores) {
            p.lse[static_cast<int64_t>(place.head) * p.queries + tile.first + row + i] =
                state.max[i] + log2f(sum) * ln_2;
        }
    }
    write_sums<D>(rows_of<float>(p.out, b, h), state.out, factor, tile.first, tile.rows);
}

// `tiles_of(rows)` makes tiles of up to so many rows.
template <int D, int R, int J, class MakeTiles>
void launch_attention_forward_fp32_of(const char* op, const AttentionParams& p, const CudaStream& stream,
                                      const MakeTiles& tiles_of) {
    using S = fp32::Shape<D, R, J>;
    const auto tiles = tiles_of(S::rows);
    const BlockOrder order = make_order(op, p, tiles.count());
    if (order.blocks() == 0) return;
    launch(op, stream, dim3(order.blocks()), fp32::threads, fp32::forward_bytes<S>,
           attention_forward_fp32_kernel<D, R, J, std::decay_t<decltype(tiles)>>, p, tiles, order);
}

template <int D, class MakeTiles>
void launch_attention_forward_fp32(const char* op, const AttentionParams& p, const CudaStream& stream,
                                   const MakeTiles& tiles_of) {
    if constexpr (D == 128) {
        if (fp32::forward_bytes<fp32::Shape<D, 4, 4>> > most_shared(op, stream))
            return launch_attention_forward_fp32_of<D, 4, 3>(op, p, stream, tiles_of);
    }
    launch_attention_forward_fp32_of<D, 4, 4>(op, p, stream, tiles_of);
}

}  // namespace var_ext::cuda
