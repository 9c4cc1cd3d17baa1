// Vectors as wide as the flags of the including file allow. Only for the variant files (NAME_variant.cpp):
// everything here is in an anonymous namespace, and nothing from the standard library is called, so that no
// function compiled with AVX flags can be linked into a path that runs without them.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int vec_bytes = 64;
#elif defined(__AVX2__)
constexpr int vec_bytes = 32;
#else
constexpr int vec_bytes = 16;  // SSE2 or NEON
#endif

template <class T, int N>
struct VecOf {
    typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <class T, int N>
using Vec = typename VecOf<T, N>::type;
template <class T>
constexpr int lanes_of = vec_bytes / static_cast<int>(sizeof(T));

template <class V, class T>
inline __attribute__((always_inline)) V load(const T* p) {  // unaligned
    V v;
    __builtin_memcpy(&v, p, sizeof(V));
    return v;
}
template <class V, class T>
inline __attribute__((always_inline)) void store(T* p, V v) {
    __builtin_memcpy(p, &v, sizeof(V));
}

template <int... I, class V>
inline __attribute__((always_inline)) V shuffle(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, I...);
#else
    typedef decltype(a < b) Mask;
    return __builtin_shuffle(a, b, Mask{I...});
#endif
}

// One step of the transposition: the 2x2 blocks [a0 a1; b0 b1] of size H become [a0 b0; a1 b1].
template <int H, bool Second, int... I, class V>
inline __attribute__((always_inline)) V exchange(V a, V b, std::integer_sequence<int, I...>) {
    constexpr int n = sizeof...(I);
    return shuffle(
        a, b,
        std::integer_sequence<int, (Second ? ((I & H) ? n + I : I + H) : ((I & H) ? n + I - H : I))...>{});
}

template <int H, int N, class V>
inline __attribute__((always_inline)) void transpose(V* rows) {  // N x N in registers, H = N / 2 down to 1
    using Lanes = std::make_integer_sequence<int, N>;
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
        if (i & H) continue;
        const V a = rows[i], b = rows[i + H];
        rows[i] = exchange<H, false>(a, b, Lanes{});
        rows[i + H] = exchange<H, true>(a, b, Lanes{});
    }
    if constexpr (H > 1) transpose<H / 2, N>(rows);
}

// 16-bit floats are carried as uint16 with a tag.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <class V>
inline __attribute__((always_inline)) V load_as(const float* p) {
    return load<V>(p);
}
template <class V>
inline __attribute__((always_inline)) V load_as(const double* p) {
    return load<V>(p);
}
template <class V>
inline __attribute__((always_inline)) void store_as(float* p, V v) {
    store(p, v);
}
template <class V>
inline __attribute__((always_inline)) void store_as(double* p, V v) {
    store(p, v);
}

template <class V>
inline __attribute__((always_inline)) V load_as(const BFloat16* p) {
    constexpr int n = sizeof(V) / 4;
#if defined(__AVX512F__)
    if constexpr (n == 16) {  // GCC 12 would convert halves and join them; maskz: the plain one warns there
        return (V)((Vec<uint32_t, n>)_mm512_maskz_cvtepu16_epi32(0xffff, load<__m256i>(p)) << 16);
    }
#endif
    const auto bits = __builtin_convertvector(load<Vec<uint16_t, n>>(p), Vec<uint32_t, n>) << 16;
    return (V)bits;
}
template <class V>
inline __attribute__((always_inline)) void store_as(BFloat16* p, V v) {
    constexpr int n = sizeof(V) / 4;
#if defined(__AVX512BF16__)  // one instruction; it takes subnormal numbers for 0
    if constexpr (n == 16) return store(p, (Vec<uint16_t, n>)_mm512_maskz_cvtneps_pbh(0xffff, (__m512)v));
#endif
    using U = Vec<uint32_t, n>;
    const U bits = (U)v;
    const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    const U nan = (U)(v != v);
    const U result = (rounded & ~nan) | (nan & 0x7fc0);
#if defined(__AVX512F__)  // as above
    if constexpr (n == 16) return store(p, _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)result));
#endif
    store(p, __builtin_convertvector(result, Vec<uint16_t, n>));
}

#if !defined(__F16C__)
inline float half_to_float(uint32_t half) {
    const uint32_t sign = (half & 0x8000) << 16;
    uint32_t exponent = (half >> 10) & 31, fraction = half & 0x3ff, bits;
    if (exponent == 31) {
        bits = 0x7f800000 | fraction << 13;
    } else if (exponent != 0) {
        bits = (exponent + 112) << 23 | fraction << 13;
    } else {
        const float value = static_cast<float>(fraction) * 0x1p-24f;  // subnormal or zero: exact
        __builtin_memcpy(&bits, &value, 4);
    }
    bits |= sign;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t float_to_half(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);   // NaN
    if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds beyond 65504
    if (bits < 0x38800000) {                                              // subnormal: let the adder round
        float magnitude;
        __builtin_memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        __builtin_memcpy(&bits, &magnitude, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000));
    }
    bits += 0xfff + (bits >> 13 & 1);  // to nearest, ties to even
    return static_cast<uint16_t>(sign | (bits - 0x38000000) >> 13);
}
#endif

template <class V>
inline __attribute__((always_inline)) V load_as(const Float16* p) {
#if defined(__F16C__) && defined(__AVX512F__)
    return (V)_mm512_maskz_cvtph_ps(0xffff, load<__m256i>(p));  // maskz: the plain one warns in GCC 12
#elif defined(__F16C__)
    return (V)_mm256_cvtph_ps(load<__m128i>(p));
#else
    constexpr int n = sizeof(V) / 4;
    float values[n];
    for (int i = 0; i < n; ++i) values[i] = half_to_float(p[i].bits);
    return load<V>(values);
#endif
}
template <class V>
inline __attribute__((always_inline)) void store_as(Float16* p, V v) {
#if defined(__F16C__) && defined(__AVX512F__)
    store(p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    store(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    constexpr int n = sizeof(V) / 4;
    for (int i = 0; i < n; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

}  // namespace
