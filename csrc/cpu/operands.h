// Operands of products: two kinds of arithmetic, and how numbers become elements of an operand.
//
// An element has 32 bits: a float, or two bfloat16 that are neighbours along the summed axis.
#pragma once

#include "cpu/vec.h"

namespace {

constexpr int lanes = lanes_of<float>;
using F = Vec<float, lanes>;
using I = Vec<int32_t, lanes>;
using U = Vec<uint32_t, lanes>;

constexpr int64_t whole_vectors(int64_t count) {
    return (count + lanes - 1) / lanes * lanes;
}

struct Floats {
    using Element = float;
    using Operand = F;
    static constexpr int depth = 1;  // numbers in an element
    static inline __attribute__((always_inline)) F multiply_add(F sum, F a, F b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct BFloat16Pairs {
    using Element = uint32_t;
    using Operand = U;
    static constexpr int depth = 2;
    static inline __attribute__((always_inline)) F multiply_add(F sum, U a, U b) {
        return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
};

inline __attribute__((always_inline)) Vec<uint16_t, lanes> round(F x) {
    return (Vec<uint16_t, lanes>)_mm512_cvtneps_pbh((__m512)x);
}
// Lane by lane: a in the lower, b in the upper half.
inline __attribute__((always_inline)) U pair(F a, F b) {
    const auto both = (Vec<uint16_t, 32>)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    using Interleaved = std::integer_sequence<int, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8,
                                              24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31>;
    return (U)shuffle(both, both, Interleaved{});
}
#endif

template <class Kind>
constexpr int64_t elements_of(int64_t count) {
    return (count + Kind::depth - 1) / Kind::depth;
}

// A vector of elements from `count` numbers; zeros after the last.
template <class Kind, class T>
inline __attribute__((always_inline)) typename Kind::Operand load_elements(const T* p, int64_t count) {
    constexpr int most = lanes * Kind::depth;
    T some[most] = {};
    if (count < most) {
        __builtin_memcpy(some, p, count * sizeof(T));
        p = some;
    }
    if constexpr (Kind::depth == 2) {
        return load<U>(p);
    } else {
        return load_as<F>(p);
    }
}

template <class T>
inline __attribute__((always_inline)) void store_numbers(T* p, F numbers, int64_t count) {
    if (count >= lanes) return store_as(p, numbers);
    T some[lanes];
    store_as(some, numbers);
    __builtin_memcpy(p, some, count * sizeof(T));
}

}  // namespace
