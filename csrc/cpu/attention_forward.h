// The forward pass of some tiles of a head. Queries stand in the lanes: their maxima, sums and factors are
// vectors, and keys and values are read a number at a time, in the order in which memory has them.
#pragma once

#include "cpu/attention.h"
#include "cpu/attention_product.h"
#include "cpu/math.h"

namespace {

constexpr float log2_of_e = 1.44269504f, ln_of_2 = 0.693147181f;

struct TileState {  // scratch of one tile; `width` lanes, one for each query
    int64_t width;
    I limit[var_ext::cpu::attention_tile / lanes];  // keys that each query sees
    float *top, *sum, *factor;
};

inline void set_limits(const var_ext::cpu::AttentionTask& task, const var_ext::cpu::AttentionTile& tile,
                       I* limit) {
    int32_t limits[var_ext::cpu::attention_tile];
    for (int64_t i = 0; i < var_ext::cpu::attention_tile; ++i) {
        limits[i] = static_cast<int32_t>(tile.keys);
        if (tile.mixed && i < tile.rows) limits[i] = task.key_limit[tile.first + i];
    }
    __builtin_memcpy(limit, limits, sizeof(limits));
}

// One block of scores (keys, width), times `unit` logarithms to base 2, becomes weights 2^(score - maximum)
// in place; pairs of keys share a row where Kind has pairs. Maxima, sums and the factor for what was summed
// before follow.
template <class Kind, bool mixed>
void weigh(float* scores, int64_t first_key, int64_t keys, float unit, TileState& tile) {
    const int64_t width = tile.width;
    for (int64_t lane = 0; lane < width; lane += lanes) {
        const I limit = tile.limit[lane / lanes];
        const float* score = scores + lane;
        F top = F{} - __builtin_inff();
        for (int64_t key = 0; key < keys; ++key) {
            F x = load<F>(score + key * width);
            if constexpr (mixed)
                x = static_cast<int32_t>(first_key + key) < limit ? x : F{} - __builtin_inff();
            top = larger(top, x);
        }
        const F before = load<F>(tile.top + lane);
        top = larger(top, before);
        // where all scores are -inf so far, any finite number will do
        const F shift = top > -3e38f ? top * unit : F{};
        F sum = {};
        const auto weight = [&](int64_t key) __attribute__((always_inline)) {
            F x = exp2_flushed(load<F>(score + key * width) * unit - shift);
            if constexpr (mixed) x = static_cast<int32_t>(first_key + key) < limit ? x : F{};
            sum += x;
            return x;
        };
        if constexpr (Kind::depth == 1) {
            for (int64_t key = 0; key < keys; ++key) store(scores + key * width + lane, weight(key));
        }
#if defined(__AVX512BF16__)
        if constexpr (Kind::depth == 2) {
            float* to = scores + lane;
            for (int64_t key = 0; key < keys; key += 2, to += width) {
                const F even = weight(key), odd = key + 1 < keys ? weight(key + 1) : F{};
                store(to, pair(even, odd));
            }
        }
#endif
        F factor = {};
        if (first_key > 0) {
            factor = exp2_flushed(before * unit - shift);
            sum += load<F>(tile.sum + lane) * factor;
        }
        store(tile.top + lane, top);
        store(tile.sum + lane, sum);
        store(tile.factor + lane, factor);
    }
}

template <class Kind, class T>
void attention_forward(const var_ext::cpu::AttentionTask& task) {
    using Element = typename Kind::Element;
    using namespace var_ext::cpu;
    const auto& p = *task.p;
    const int64_t dim = p.dim, row = whole_vectors(dim);
    const int64_t k_row = whole_vectors(elements_of<Kind>(dim));
    int64_t keys = 0;
    for (int64_t i = 0; i < task.tile_count; ++i) {
        const int64_t seen = task.tiles[i * task.tile_step].keys;
        keys = keys > seen ? keys : seen;
    }
    float* k = task.scratch;                               // (keys, D)
    float* v = k + keys * k_row;                           // (keys, D), elements along the keys
    float* scores = v + (keys + 1) * row;                  // (block, tile)
    float* q = scores + attention_block * attention_tile;  // (D, tile)
    float* out = q + row * attention_tile;                 // (D, tile)
    TileState state;
    state.top = out + row * attention_tile;
    state.sum = state.top + attention_tile;
    state.factor = state.sum + attention_tile;

    const auto at = [&](const var_ext::AttentionHeads& heads, int64_t first) {
        return head_of<T>(heads, task.b, task.h) + first * heads.stride_l;
    };
    const auto ahead = [&](const var_ext::AttentionHeads& heads, int64_t first, int64_t rows) {
        constexpr int64_t size = sizeof(T);
        return Ahead{reinterpret_cast<const char*>(at(heads, first)), heads.stride_l * size, rows,
                     dim * size};
    };
    const float unit = __builtin_fabsf(p.scale) * log2_of_e;
    int64_t packed = 0;  // keys and values: whole blocks, or all

    for (int64_t i = 0; i < task.tile_count; ++i) {
        const AttentionTile& tile = task.tiles[i * task.tile_step];
        const int64_t width = state.width = whole_vectors(tile.rows);
        pack_transposed<Kind>(at(p.q, tile.first), p.q.stride_l, tile.rows, dim, (Element*)q);
        if (p.scale < 0) negate<Kind>((Element*)q, elements_of<Kind>(dim) * width);
        set_limits(task, tile, state.limit);
        for (int64_t lane = 0; lane < width; lane += lanes) store(state.top + lane, F{} - __builtin_inff());

        for (int64_t first = 0; first < tile.keys; first += attention_block) {
            const int64_t count = tile.keys - first < attention_block ? tile.keys - first : attention_block;
            Element* const k_block = (Element*)k + first * k_row;
            Element* const v_block = (Element*)v + first / Kind::depth * row;
            Ahead next_k, next_v;
            if (packed <= first) {
                packed = keys - first < attention_block ? keys : first + attention_block;
                pack_rows<Kind>(at(p.k, first), p.k.stride_l, packed - first, dim, k_block);
                pack_columns<Kind>(at(p.v, first), p.v.stride_l, packed - first, dim, v_block);
                const int64_t rest = keys - packed < attention_block ? keys - packed : attention_block;
                next_k = ahead(p.k, packed, rest);
                next_v = ahead(p.v, packed, rest);
            } else if (first + count == tile.keys && i + 1 < task.tile_count) {
                const AttentionTile& next = task.tiles[(i + 1) * task.tile_step];
                next_k = ahead(p.q, next.first, next.rows);
            }
            multiply<Kind, Side::rows>({count, width, elements_of<Kind>(dim), k_block, k_row, (Element*)q,
                                        width, scores, width, false, nullptr, next_k});
            if (tile.mixed) {
                weigh<Kind, true>(scores, first, count, unit, state);
            } else {
                weigh<Kind, false>(scores, first, count, unit, state);
            }
            multiply<Kind, Side::columns>({dim, width, elements_of<Kind>(count), v_block, row,
                                           (Element*)scores, width, out, width, first > 0, state.factor,
                                           next_v});
        }

        for (int64_t lane = 0; lane < width; lane += lanes) {
            store(state.factor + lane, 1.0f / load<F>(state.sum + lane));
        }
        unpack_transposed(out, state.factor, tile.rows, dim, at(p.out, tile.first), p.out.stride_l);
        if (p.lse == nullptr) continue;
        float* lse = p.lse + (task.b * p.heads + task.h) * p.queries + tile.first;
        for (int64_t r = 0; r < tile.rows; ++r) {
            lse[r] = state.top[r] * unit * ln_of_2 + __builtin_logf(state.sum[r]);
        }
    }
}

}  // namespace
