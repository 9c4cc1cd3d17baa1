// The search of nearest_code, compiled once for each variant.
#pragma once

#include "cpu/nearest_code.h"
#include "cpu/vec.h"

namespace {

// R: the sums of R rows and two vectors of codes stay in registers; AVX-512 has 32 of them, AVX2 and SSE 16.
constexpr int rows_at_once = vec_bytes == 64 ? 12 : vec_bytes == 32 ? 6 : 4;

inline float nearest_code_pack(const var_ext::NearestCodeParams& p, int64_t first, int64_t count,
                               float* panel, float* bias) {
    constexpr int n = lanes_of<float>, width = 2 * n;
    using V = Vec<float, n>;
    using U = Vec<uint32_t, n>;
    const float* codes = p.codebook + first * p.codebook_stride_v;
    int64_t k = 0;
    if (count == width && p.codebook_stride_c == 1) {
        for (; k + n <= p.c; k += n) {
            for (int half = 0; half < width; half += n) {
                V tile[n];
#pragma GCC unroll 16
                for (int j = 0; j < n; ++j) tile[j] = load<V>(codes + (half + j) * p.codebook_stride_v + k);
                transpose<n / 2, n>(tile);
#pragma GCC unroll 16
                for (int j = 0; j < n; ++j) store(panel + (k + j) * width + half, tile[j]);
            }
        }
    }
    for (; k < p.c; ++k) {
        for (int64_t j = 0; j < width; ++j) {
            const int64_t at = j * p.codebook_stride_v + k * p.codebook_stride_c;
            panel[k * width + j] = j < count ? codes[at] : 0;
        }
    }

    float most = 0;
    for (int half = 0; half < width; half += n) {
        V square = {}, size = {};
        for (k = 0; k < p.c; ++k) {
            const V e = load<V>(panel + k * width + half);
            square += e * e;
            size += (V)((U)e & 0x7fffffffu);  // |e|
        }
        if (p.cosine) {
            V length;  // with the floor that torch's normalize has
            for (int j = 0; j < n; ++j) length[j] = __builtin_sqrtf(square[j] < 1e-24f ? 1e-24f : square[j]);
            for (k = 0; k < p.c; ++k) {
                store(panel + k * width + half, load<V>(panel + k * width + half) / length);
            }
            size /= length;
            square = V{};
        }
        for (int j = 0; j < n; ++j) {
            bias[half + j] = half + j < count ? square[j] / 2 : __builtin_inff();
            if (size[j] > most || size[j] != size[j]) most = size[j];
        }
    }
    return most;
}

// The code of the lowest score; of equal ones the first.
template <class V, class I>
inline int32_t nearest_code_lowest(V low, I code) {
    float lowest = low[0];
    int32_t best = code[0];
    for (int l = 1; l < lanes_of<float>; ++l) {
        if (low[l] < lowest || (low[l] == lowest && code[l] < best)) {
            lowest = low[l];
            best = code[l];
        }
    }
    return best;
}

// R rows x two vectors of codes: 2R sums stay in registers over the whole of C.
template <int R>
void nearest_code_search(const float* rows, const float* panels, const float* bias, int64_t panel_count,
                         int64_t c, int32_t* best) {
    constexpr int n = lanes_of<float>;
    using V = Vec<float, n>;
    using I = Vec<int32_t, n>;
    V low[R];  // per lane: the lowest score so far, and the code it came from
    I code[R];
    I lane;
    for (int l = 0; l < n; ++l) lane[l] = l;
    for (int r = 0; r < R; ++r) {
        low[r] = V{} + __builtin_inff();
        code[r] = I{};
    }
    for (int64_t panel = 0; panel < panel_count; ++panel, panels += c * 2 * n, bias += 2 * n) {
        V dot0[R], dot1[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) dot0[r] = dot1[r] = V{};
        const float* x = rows;
        const float* e = panels;
        for (int64_t k = 0; k < c; ++k, x += R, e += 2 * n) {
            const V e0 = load<V>(e), e1 = load<V>(e + n);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                dot0[r] += x[r] * e0;
                dot1[r] += x[r] * e1;
            }
        }
        const V bias0 = load<V>(bias), bias1 = load<V>(bias + n);
        const I code0 = lane + static_cast<int32_t>(panel * 2 * n), code1 = code0 + n;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {  // strictly lower: within a lane the first of equal scores stays
            const V score0 = bias0 - dot0[r], score1 = bias1 - dot1[r];
            code[r] = score0 < low[r] ? code0 : code[r];
            low[r] = score0 < low[r] ? score0 : low[r];
            code[r] = score1 < low[r] ? code1 : code[r];
            low[r] = score1 < low[r] ? score1 : low[r];
        }
    }
    for (int r = 0; r < R; ++r) best[r] = nearest_code_lowest(low[r], code[r]);
}

}  // namespace
