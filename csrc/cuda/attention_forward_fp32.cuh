// Attention forward in float32: exact products, softmax with its maximum and sum carried from one tile of
// keys to the next.
#pragma once

#include "cuda/attention_fp32.cuh"

namespace var_ext::cuda {

namespace fp32 {

template <int D>
constexpr int forward_floats = 3 * tile_floats<D> + weight_floats;  // q, k, v and weights

// What a thread carries along for its four rows: the maximum, its own columns' part of the sum.
template <int D>
struct SoftmaxOfRows {
    float out[4][columns<D>] = {};
    float max[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, sum[4] = {};

    // Takes on scores and turns them into weights.
    __device__ void add_scores(float (&s)[4][4]) {
        for (int i = 0; i < 4; ++i) {
            float top = max[i];
            for (int j = 0; j < 4; ++j) top = fmaxf(top, s[i][j]);
            top = max_row(top);
            // scores of -inf alone so far: they weigh nothing, and nothing is taken off them
            const float base = top == -INFINITY ? 0.0f : top;
            const float decay = exp2f((max[i] - base) * log2_e);
            max[i] = top;
            sum[i] *= decay;
            for (int c = 0; c < columns<D>; ++c) out[i][c] *= decay;
            for (int j = 0; j < 4; ++j) {
                s[i][j] = exp2f((s[i][j] - base) * log2_e);
                sum[i] += s[i][j];
            }
        }
    }
};

}  // namespace fp32

// Keys are on their way while values are in use, and the other way round.
// budget <32>: registers <= 128, shared <= 41984, blocks >= 2
// budget <64>: registers <= 128, shared <= 66560, blocks >= 2
// budget <128>: registers <= 128, shared <= 115712, blocks >= 1
// sass: FFMA, LDGSTS, LDS.128
template <int D, class Tiles>
__global__ void __launch_bounds__(fp32::threads, D == 128 ? 1 : 2)
    attention_forward_fp32_kernel(const __grid_constant__ AttentionParams p,
                                  const __grid_constant__ Tiles tiles,
                                  const __grid_constant__ BlockOrder order) {
    using namespace fp32;
    const BlockOrder::Place place = order.place(blockIdx.x);
    const Tile tile = tiles.tile(tiles.count() - 1 - static_cast<int32_t>(place.rank));
    const uint32_t b = place.b, h = place.h;

    float* const q_tile = reinterpret_cast<float*>(ptx::shared_memory());
    float* const k_tile = q_tile + tile_floats<D>;
    float* const v_tile = k_tile + tile_floats<D>;
    float* const weights = v_tile + tile_floats<D>;
    const Rows<const float> k_rows = rows_of<const float>(p.k, b, h),
                            v_rows = rows_of<const float>(p.v, b, h);
    start_copy<D>(q_tile, rows_of<const float>(p.q, b, h), tile.first, tile.first + tile.rows);
    start_copy<D>(k_tile, k_rows, 0, tile.keys);

    // keys that the first and the last row of the warp see
    const int row = row_of_thread(), last = tile.rows - 1;
    int32_t least = row_of_warp() <= last ? tile.keys : 0, most = least;  // a warp without rows has no work
    if (tile.mixed && most > 0) {
        least = tiles.end_of_scale(tile.first + row_of_warp());
        most = tiles.end_of_scale(tile.first + min(row_of_warp() + 7, last));
    }

    SoftmaxOfRows<D> state;
#pragma unroll 1
    for (int32_t at = 0; at < tile.keys; at += tile_rows) {
        ptx::cp_async_wait<0>();
        __syncthreads();
        start_copy<D>(v_tile, v_rows, at, tile.keys);
        if (at < most) {
            float s[4][4];
            multiply_rows<D>(s, q_tile, k_tile);
            for (int i = 0; i < 4; ++i) {
                for (int j = 0; j < 4; ++j) s[i][j] *= p.scale;
            }
            if (at + tile_rows > least) {
                for (int i = 0; i < 4; ++i) {
                    int32_t end = tile.keys;
                    if (tile.mixed) end = tiles.end_of_scale(tile.first + min(row + i, last));
                    for (int j = 0; j < 4; ++j) {
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
        if (at + tile_rows < tile.keys) start_copy<D>(k_tile, k_rows, at + tile_rows, tile.keys);
        if (at < most) add_product<D>(state.out, weights, v_tile, min(most - at, tile_rows));
    }

    float factor[4];
    for (int i = 0; i < 4; ++i) {
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
template <int D, class MakeTiles>
void launch_attention_forward_fp32(const char* op, const AttentionParams& p, const CudaStream& stream,
                                   const MakeTiles& tiles_of) {
    const auto tiles = tiles_of(fp32::tile_rows);
    const BlockOrder order = make_order(op, p, tiles.count());
    if (order.blocks() == 0) return;
    launch(op, stream, dim3(order.blocks()), fp32::threads, fp32::forward_floats<D> * sizeof(float),
           attention_forward_fp32_kernel<D, std::decay_t<decltype(tiles)>>, p, tiles, order);
}

}  // namespace var_ext::cuda
