// Elementary functions and reductions on the vectors of vec.h; the same rules hold here.
#pragma once

#include "cpu/vec.h"

namespace {

// e^x to 2 units in the last place. Below -86.6 (2^-125) it is 0, beyond 88.7 infinity; NaN stays NaN.
template <class V>
inline __attribute__((always_inline)) V exp(V x) {
    constexpr int n = sizeof(V) / 4;
    using I = Vec<int32_t, n>;
    const V bounded = x < -86.6f ? V{} - 86.6f : x > 89.0f ? V{} + 89.0f : x;
    // x = k ln 2 + r, |r| <= ln 2 / 2: adding 1.5 * 2^23 rounds to the integer k, which is left in the low
    // bits
    const V shifted = bounded * 1.44269504f + 12582912.0f;
    const V k = shifted - 12582912.0f;
    const V r = (bounded - k * 0.693359375f) + k * 2.12194440e-4f;  // ln 2 in two parts: the first is exact
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    // 2^(k - 1), then doubled: 2^128 is no float
    const V power = (V)(((I)shifted + (126 - 0x4b400000)) << 23);
    const V result = p * power * 2.0f;
    return x < -86.6f ? V{} : result;
}

// 2^x, made for 1 / (1 + 2^x): to 2 units in the last place, or to 3e-6 if the result is going to be rounded
// to 16 bits; beyond 129 it is infinity, NaN stays NaN, and below -126 it is something between 0 and 2^-126.
template <bool Rough = false, class V>
inline __attribute__((always_inline)) V exp2(V x) {
    // x = k + f, 0 <= f <= 1, and a polynomial for 2^f, the best for its degree
    const auto fraction_power = [](V f) {
        if constexpr (Rough) {
            V p = f * 1.35341678e-2f + 5.20114601e-2f;
            p = p * f + 2.41442755e-1f;
            p = p * f + 6.93003833e-1f;
            return p * f + 1.00000262f;
        } else {
            V p = f * 2.17022549e-4f + 1.24396873e-3f;
            p = p * f + 9.67884064e-3f;
            p = p * f + 5.54833412e-2f;
            p = p * f + 2.40229830e-1f;
            p = p * f + 6.93147004e-1f;
            return p * f + 1.0f;
        }
    };
#if defined(__AVX512DQ__)
    if constexpr (sizeof(V) == 64) {
        const __m512 t = (__m512)x;
        const V f = (V)_mm512_maskz_reduce_ps(0xffff, t, 9);  // t - floor(t); 0 of an infinity
        return (V)_mm512_maskz_scalef_ps(0xffff, (__m512)fraction_power(f), t);
    }
#endif
    using I = Vec<int32_t, sizeof(V) / 4>;
    const V bounded = x < -126.0f ? V{} - 126.0f : x > 129.0f ? V{} + 129.0f : x;
    const V shifted = (bounded - 0.5f) + 12582912.0f;  // as in exp, but rounded down
    const V power = (V)(((I)shifted + (126 - 0x4b400000)) << 23);
    return fraction_power(bounded - (shifted - 12582912.0f)) * power * 2.0f;
}

// Sums and maxima over the lanes, always in the same order: halves, quarters, ...
template <int Shift, int... I, class V>
inline __attribute__((always_inline)) V rotated(V v, std::integer_sequence<int, I...>) {
    constexpr int n = sizeof...(I);
    return shuffle(v, v, std::integer_sequence<int, (I + Shift) % n...>{});
}
template <class V, int Shift = sizeof(V) / 8>
inline __attribute__((always_inline)) float reduce_add(V v) {
    if constexpr (Shift == 0) {
        return v[0];
    } else {
        return reduce_add<V, Shift / 2>(v +
                                        rotated<Shift>(v, std::make_integer_sequence<int, sizeof(V) / 4>{}));
    }
}
template <class V, int Shift = sizeof(V) / 8>
inline __attribute__((always_inline)) float reduce_max(V v) {
    if constexpr (Shift == 0) {
        return v[0];
    } else {
        const V other = rotated<Shift>(v, std::make_integer_sequence<int, sizeof(V) / 4>{});
        return reduce_max<V, Shift / 2>(v > other ? v : other);
    }
}

}  // namespace
