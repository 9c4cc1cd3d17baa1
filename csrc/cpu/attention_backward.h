// The backward pass of a head. Weights P are made again from the log-sum-exp; with delta = sum of dO * O:
//   dV += P^T dO,  dS = P * (dO V^T - delta),  dQ = scale dS K,  dK += scale dS^T Q.
#pragma once

#include "cpu/attention_forward.h"

namespace {

template <class T>
inline float dot(const T* a, const T* b, int64_t count) {
    F sum = {};
    for (int64_t i = 0; i < count; i += lanes) {
        sum += load_elements<Floats>(a + i, count - i) * load_elements<Floats>(b + i, count - i);
    }
    return reduce_add(sum);
}

// Scratch of one block. Keys stand in the rows of all of them, queries in the lanes.
struct GradientBlock {
    int64_t width;
    I limit[var_ext::cpu::attention_tile / lanes];
    float *lse, *delta;     // (tile,), lse to base 2
    float *scores, *grads;  // (block, tile): scores and dO V^T, then P and dS; dS in elements along the keys
    float *p_rows, *ds_rows;  // (block, tile): P and dS in elements along the queries
};

// Scores and dO V^T of a block become P and dS.
template <class Kind, bool mixed>
void weigh_gradients(const GradientBlock& block, int64_t first_key, int64_t keys, float unit) {
    const int64_t width = block.width;
    for (int64_t lane = 0; lane < width; lane += lanes) {
        const I limit = block.limit[lane / lanes];
        const F lse = load<F>(block.lse + lane), delta = load<F>(block.delta + lane);
        float *scores = block.scores + lane, *grads = block.grads + lane;
        const auto weight = [&](int64_t key) __attribute__((always_inline)) {
            F p = exp2_flushed(load<F>(scores + key * width) * unit - lse);
            if constexpr (mixed) p = static_cast<int32_t>(first_key + key) < limit ? p : F{};
            return p;
        };
        if constexpr (Kind::depth == 1) {
            for (int64_t key = 0; key < keys; ++key) {
                const F p = weight(key);
                store(scores + key * width, p);
                store(grads + key * width, p * (load<F>(grads + key * width) - delta));
            }
        }
#if defined(__AVX512BF16__)
        if constexpr (Kind::depth == 2) {
            float *p_row = block.p_rows + lane / 2, *ds_row = block.ds_rows + lane / 2;
            for (int64_t key = 0; key < keys; key += 2, p_row += width, ds_row += width) {
                F ds[2] = {};
                for (int64_t i = 0; i < 2 && key + i < keys; ++i) {
                    const F p = weight(key + i);
                    ds[i] = p * (load<F>(grads + (key + i) * width) - delta);
                    store(p_row + i * width / 2, round(p));
                    store(ds_row + i * width / 2, round(ds[i]));
                }
                store(grads + key / 2 * width, pair(ds[0], ds[1]));
            }
        }
#endif
    }
}

template <class Kind, class T>
void attention_backward(const var_ext::cpu::AttentionTask& task) {
    using Element = typename Kind::Element;
    using namespace var_ext::cpu;
    const auto& p = *task.p;
    const auto& g = *task.gradients;
    const auto at = [&](const var_ext::AttentionHeads& heads, int64_t first) {
        return head_of<T>(heads, task.b, task.h) + first * heads.stride_l;
    };
    const int64_t dim = p.dim, row = whole_vectors(dim), keys = p.keys;
    const int64_t elements = elements_of<Kind>(dim), k_row = whole_vectors(elements);
    float* next = task.scratch;
    const auto take = [&](int64_t rows, int64_t columns) {
        float* const taken = next;
        next += rows * columns;
        return taken;
    };
    float *dk = take(keys, row), *dv = take(keys, row);
    Element *k = (Element*)take(keys, row), *v = (Element*)take(keys, row);     // (keys, D)
    Element* k_columns = Kind::depth == 1 ? k : (Element*)take(keys + 1, row);  // elements along the keys
    Element *q = (Element*)take(row, attention_tile),
            *grad = (Element*)take(row, attention_tile);       // (D, tile)
    Element* q_columns = (Element*)take(attention_tile, row);  // (tile, D), elements along the queries
    Element* grad_columns = (Element*)take(attention_tile, row);
    float* dq = take(row, attention_tile);  // (D, tile)
    GradientBlock block;
    block.scores = take(attention_block, attention_tile);
    block.grads = take(attention_block, attention_tile);
    block.p_rows = Kind::depth == 1 ? block.scores : take(attention_block, attention_tile / 2);
    block.ds_rows = Kind::depth == 1 ? block.grads : take(attention_block, attention_tile / 2);
    block.lse = take(1, attention_tile);
    block.delta = take(1, attention_tile);

    for (int64_t i = 0; i < keys * row; i += lanes) {
        store(dk + i, F{});
        store(dv + i, F{});
    }
    pack_rows<Kind>(at(p.k, 0), p.k.stride_l, keys, dim, k);
    pack_rows<Kind>(at(p.v, 0), p.v.stride_l, keys, dim, v);
    if (Kind::depth > 1) pack_columns<Kind>(at(p.k, 0), p.k.stride_l, keys, dim, k_columns);
    const float unit = p.scale * log2_of_e;
    const float* lse = p.lse + (task.b * p.heads + task.h) * p.queries;

    for (int64_t t = 0; t < task.tile_count; ++t) {
        const AttentionTile& tile = task.tiles[t];
        const int64_t width = block.width = whole_vectors(tile.rows), steps = elements_of<Kind>(tile.rows);
        const T* const grad_rows = at(g.grad_out, tile.first);
        pack_transposed<Kind>(at(p.q, tile.first), p.q.stride_l, tile.rows, dim, q);
        pack_transposed<Kind>(grad_rows, g.grad_out.stride_l, tile.rows, dim, grad);
        pack_columns<Kind>(at(p.q, tile.first), p.q.stride_l, tile.rows, dim, q_columns);
        pack_columns<Kind>(grad_rows, g.grad_out.stride_l, tile.rows, dim, grad_columns);
        set_limits(task, tile, block.limit);
        for (int64_t r = 0; r < width; ++r) {
            const bool real = r < tile.rows;  // the others have weights of 0
            block.lse[r] = real ? lse[tile.first + r] * log2_of_e : __builtin_inff();
            block.delta[r] =
                real ? dot(grad_rows + r * g.grad_out.stride_l, at(p.out, tile.first + r), dim) : 0;
        }

        for (int64_t first = 0; first < tile.keys; first += attention_block) {
            const int64_t count = tile.keys - first < attention_block ? tile.keys - first : attention_block;
            multiply<Kind, Side::rows>({count, width, elements, k + first * k_row, k_row, q, width,
                                        block.scores, width, false, nullptr});
            multiply<Kind, Side::rows>({count, width, elements, v + first * k_row, k_row, grad, width,
                                        block.grads, width, false, nullptr});
            if (tile.mixed) {
                weigh_gradients<Kind, true>(block, first, count, unit);
            } else {
                weigh_gradients<Kind, false>(block, first, count, unit);
            }
            multiply<Kind, Side::rows>({count, row, steps, (Element*)block.p_rows, width / Kind::depth,
                                        grad_columns, row, dv + first * row, row, true, nullptr});
            multiply<Kind, Side::rows>({count, row, steps, (Element*)block.ds_rows, width / Kind::depth,
                                        q_columns, row, dk + first * row, row, true, nullptr});
            multiply<Kind, Side::columns>({dim, width, elements_of<Kind>(count),
                                           k_columns + first / Kind::depth * row, row, (Element*)block.grads,
                                           width, dq, width, first > 0, nullptr});
        }
        for (int64_t lane = 0; lane < width; lane += lanes) store(block.lse + lane, F{} + p.scale);
        unpack_transposed(dq, block.lse, tile.rows, dim, at(g.dq, tile.first), g.dq.stride_l);
    }
    unpack_rows(dk, p.scale, keys, dim, at(g.dk, 0), g.dk.stride_l);
    unpack_rows(dv, 1.0f, keys, dim, at(g.dv, 0), g.dv.stride_l);
}

}  // namespace
