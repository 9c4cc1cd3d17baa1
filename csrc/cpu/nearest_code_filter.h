// The search of nearest_code behind a filter in bf16, whose dot products run at about twice the speed.
//
// The filter computes g' ~ dot - bias for every code from x' and e', x and e rounded to bf16, and keeps the
// maxima of 16 lanes for each (row, panel). The plain search computes g, in fp32 and with another rounding.
// With Euclidean norms and dx = x - x', de = e - e':
//   |x.e - x'.e'| = |dx.e + x'.de| <= |dx| |e| + |x'| |de|.
// Either sum has C + 1 additions and at most C rounded products (none if they are fused; those of bf16 are
// exact); each rounds relative to at most |x| |e| + bias. So rounding takes the two apart by (C + 2) 2^-22
// (|x| |e| + bias) at most, and underflow, with denormals flushed, by (C + 2) 2^-125. The sum B of these,
// with the largest |e|, |de| and bias, bounds |g - g'|. The code that the plain search would choose has g >=
// g of the filter's best, hence g' >= max g' - 2B: panels below hold neither it nor a tie. The others are
// searched again by the plain search's own arithmetic, so tokens are the same.
#pragma once

#include <immintrin.h>

#include "cpu/nearest_code_search.h"

namespace {

using var_ext::cpu::NearestCodeFilter;

using F = Vec<float, 16>;
using U = Vec<uint32_t, 16>;
using I = Vec<int32_t, 16>;

// To nearest, ties to even; denormals to 0. The bf16 stands in the upper half.
inline __attribute__((always_inline)) U bf16_of(F x) {
    const U bits = (U)x;
    const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
    return (rounded & 0x7f800000) == 0 ? U{} : rounded;
}

// An upper bound of a norm from its sum of squares: 2^-125 a square for underflow, 2^-10 for rounding.
inline float norm_bound(float squares, int64_t c) {
    return __builtin_sqrtf(squares + static_cast<float>(c) * 0x1p-125f) * (1 + 0x1p-10f);
}

// (C, 32) fp32 -> (C / 2, 32) pairs of bf16; norms: the largest |e| and |de|. NaN is passed over: the
// caller has its own search for codebooks that hold one.
void pack_filter(const float* panel, int64_t c, uint32_t* pairs, float* norms) {
    F square[2] = {}, lost[2] = {};
    for (int64_t k = 0; k < c; k += 2) {
        for (int half = 0; half < 2; ++half) {
            const F e0 = load<F>(panel + k * 32 + half * 16);
            const F e1 = k + 1 < c ? load<F>(panel + (k + 1) * 32 + half * 16) : F{};
            const U b0 = bf16_of(e0), b1 = bf16_of(e1);
            const F d0 = e0 - (F)b0, d1 = e1 - (F)b1;
            square[half] += e0 * e0 + e1 * e1;
            lost[half] += d0 * d0 + d1 * d1;
            store(pairs + k * 16 + half * 16, b0 >> 16 | b1);
        }
    }
    norms[0] = norms[1] = 0;
    for (int j = 0; j < 32; ++j) {
        const float e = norm_bound(square[j / 16][j % 16], c), de = norm_bound(lost[j / 16][j % 16], c);
        if (e > norms[0]) norms[0] = e;
        if (de > norms[1]) norms[1] = de;
    }
}

// Rows (C, R) as (C / 2, R) pairs, and 2B for each; infinite or NaN where no bound can be given.
void pack_rows(const float* rows, int64_t c, const float* norms, float largest_bias, uint32_t* pairs,
               float* margin) {
    float square[rows_at_once] = {}, lost[rows_at_once] = {};
    for (int64_t k = 0; k < c; ++k) {
        for (int r = 0; r < rows_at_once; ++r) {
            const float x = rows[k * rows_at_once + r];
            uint32_t bits;
            __builtin_memcpy(&bits, &x, 4);
            bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
            bits = (bits & 0x7f800000) == 0 ? 0 : bits;
            float rounded;
            __builtin_memcpy(&rounded, &bits, 4);
            square[r] += rounded * rounded;
            lost[r] += (x - rounded) * (x - rounded);
            uint32_t* pair = pairs + k / 2 * rows_at_once + r;
            *pair = k % 2 == 0 ? bits >> 16 : *pair | bits;
        }
    }
    for (int r = 0; r < rows_at_once; ++r) {
        const float x = norm_bound(square[r], c), dx = norm_bound(lost[r], c);
        const float steps = static_cast<float>(c + 2);
        const float size = (x + dx) * (norms[0] + norms[1]) + largest_bias;
        margin[r] = 2 * (dx * norms[0] + x * norms[1] + steps * (0x1p-22f * size + 0x1p-125f));
        margin[r] *= 1 + 0x1p-10f;  // these lines round as well
    }
}

// The maxima over each panel, 16 lanes a (panel, row), and over all panels.
void filter_maxima(const uint32_t* x, const uint32_t* panels, const float* bias, int64_t panel_count,
                   int64_t pair_count, float* maxima, F* highest) {
    constexpr int R = rows_at_once;
    for (int r = 0; r < R; ++r) highest[r] = F{} - __builtin_inff();
    for (int64_t panel = 0; panel < panel_count; ++panel, maxima += R * 16) {
        __m512 dot0[R], dot1[R];
        const F bias0 = -load<F>(bias + panel * 32), bias1 = -load<F>(bias + panel * 32 + 16);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            dot0[r] = (__m512)bias0;
            dot1[r] = (__m512)bias1;
        }
        const uint32_t* pair = x;
        for (int64_t k = 0; k < pair_count; ++k, pair += R, panels += 32) {
            const auto e0 = (__m512bh)load<U>(panels), e1 = (__m512bh)load<U>(panels + 16);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const auto both = (__m512bh)(U{} + pair[r]);
                dot0[r] = _mm512_dpbf16_ps(dot0[r], both, e0);
                dot1[r] = _mm512_dpbf16_ps(dot1[r], both, e1);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const F most = (F)dot0[r] > (F)dot1[r] ? (F)dot0[r] : (F)dot1[r];
            store(maxima + r * 16, most);
            highest[r] = most > highest[r] ? most : highest[r];
        }
    }
}

bool search_filtered(const float* rows, const float* panels, const float* bias,
                     const NearestCodeFilter& filter, int64_t panel_count, int64_t c, float* scratch,
                     int32_t* best) {
    constexpr int R = rows_at_once;
    float* maxima = scratch;
    auto* pairs = reinterpret_cast<uint32_t*>(scratch + panel_count * R * 16);
    float margin[R];
    pack_rows(rows, c, filter.norms, filter.largest_bias, pairs, margin);
    for (int r = 0; r < R; ++r) {
        if (!(margin[r] < 1e30f)) return false;
    }
    F highest[R];
    filter_maxima(pairs, filter.panels, bias, panel_count, (c + 1) / 2, maxima, highest);

    F low[R], bound[R];
    I code[R], lane;
    for (int l = 0; l < 16; ++l) lane[l] = l;
    for (int r = 0; r < R; ++r) {
        float most = highest[r][0];
        for (int l = 1; l < 16; ++l) most = highest[r][l] > most ? highest[r][l] : most;
        const float least = most - margin[r];
        bound[r] = F{} + (least - __builtin_fabsf(least) * 0x1p-23f);  // the subtraction rounds
        low[r] = F{} + __builtin_inff();
        code[r] = I{};
    }
    int64_t affordable = panel_count * R / 8;  // a panel costs some four times as much here as in the filter
    for (int64_t panel = 0; panel < panel_count; ++panel) {
        for (int r = 0; r < R; ++r) {
            const F most = load<F>(maxima + (panel * R + r) * 16);
            if (!_mm512_cmp_ps_mask((__m512)most, (__m512)bound[r], _CMP_GE_OQ)) continue;
            if (--affordable < 0) return false;
            F dot0 = {}, dot1 = {};
            const float* e = panels + panel * c * 32;
            for (int64_t k = 0; k < c; ++k, e += 32) {
                dot0 += rows[k * R + r] * load<F>(e);
                dot1 += rows[k * R + r] * load<F>(e + 16);
            }
            const F score0 = load<F>(bias + panel * 32) - dot0,
                    score1 = load<F>(bias + panel * 32 + 16) - dot1;
            const I code0 = lane + static_cast<int32_t>(panel * 32), code1 = code0 + 16;
            code[r] = score0 < low[r] ? code0 : code[r];
            low[r] = score0 < low[r] ? score0 : low[r];
            code[r] = score1 < low[r] ? code1 : code[r];
            low[r] = score1 < low[r] ? score1 : low[r];
        }
    }
    for (int r = 0; r < R; ++r) best[r] = nearest_code_lowest(low[r], code[r]);
    return true;
}

}  // namespace
