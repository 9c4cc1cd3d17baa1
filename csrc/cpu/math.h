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
inline __attribute__((always_inline)) V exp2(V x) {
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
