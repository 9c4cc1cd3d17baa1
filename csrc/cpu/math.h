// Elementary functions and reductions on the vectors of vec.h; the same rules hold here.
#pragma once

#include "cpu/vec.h"

namespace {

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
    // adding 1.5 * 2^23 rounds to the integer k, which is left in the low bits; where x is one itself, k may
    // be x - 1
    const V shifted = (bounded - 0.5f) + 12582912.0f;
    const V power = (V)(((I)shifted + (126 - 0x4b400000)) << 23);
    return fraction_power(bounded - (shifted - 12582912.0f)) * power * 2.0f;
}

// The larger one; b where either is NaN. Compilers do not see one instruction in the comparison everywhere.
template <class V>
inline __attribute__((always_inline)) V larger(V a, V b) {
#if defined(__AVX512F__)
    return (V)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (V)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// 2^x for x below 127, to 2 units in the last place. Below -126.5 it is 0; NaN stays NaN.
template <class V>
inline __attribute__((always_inline)) V exp2_flushed(V x) {
    constexpr int n = sizeof(V) / 4;
    using I = Vec<int32_t, n>;
    const V bounded = larger(V{} - 127.0f, x);
    // x = k + r, |r| <= 1/2: adding 1.5 * 2^23 + 127 leaves k + 127, the exponent of 2^k, in the low bits
    const V shifted = bounded + 12583039.0f;
    const V r = bounded - (shifted - 12583039.0f);
    V p = r * 1.3276472e-3f + 9.6755416e-3f;
    p = p * r + 5.5507133e-2f;
    p = p * r + 2.4022120e-1f;
    p = p * r + 6.9314697e-1f;
    p = p * r + 1.0000001f;
    return p * (V)((I)shifted << 23);
}

// The sum over the lanes, always in the same order: halves, quarters, ...
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

}  // namespace
