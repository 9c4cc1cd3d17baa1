// What kernels over rows of any length and dtype share: loops over whole vectors and a rest, sums over rows.
// For variant files only; the rules of vec.h hold here.
#pragma once

#include <type_traits>

#include "common/dtype.h"
#include "cpu/math.h"
#include "cpu/vec.h"

namespace {

constexpr int lanes = lanes_of<float>;
using V = Vec<float, lanes>;

inline int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// Whether a result stored as S may be computed to fewer digits than float32 has.
template <class S>
constexpr bool rough = sizeof(S) == 2;

// How much of a vector is there: all of it, or the first `count` elements at the end of a row. What handles a
// part is not inlined: it runs once a row at most, and would double the code of every loop.
struct Whole {};
struct Part {
    int64_t count;
};

template <class V, class S>
inline __attribute__((always_inline)) V load_as(const S* p, Whole) {
    return load_as<V>(p);
}
template <class V, class S>
__attribute__((noinline)) V load_as(const S* p, Part part) {  // zero beyond the end
    S values[sizeof(V) / 4] = {};
    __builtin_memcpy(values, p, part.count * sizeof(S));
    return load_as<V>(values);
}
template <class S, class V>
inline __attribute__((always_inline)) void store_as(S* p, V v, Whole) {
    store_as(p, v);
}
template <class S, class V>
__attribute__((noinline)) void store_as(S* p, V v, Part part) {
    S values[sizeof(V) / 4];
    store_as(values, v, Whole{});
    __builtin_memcpy(p, values, part.count * sizeof(S));
}

// store_as, past the caches if Stream and the chip can; p is aligned to a vector of S then. Chunks that
// stream end with stream_end(), so that other threads see what was written.
template <bool Stream, class S, class V>
inline __attribute__((always_inline)) void put(S* p, V v, Whole whole) {
#if defined(__AVX2__)
    if constexpr (Stream) {
        S values[sizeof(V) / 4];
        store_as(values, v, whole);
        if constexpr (sizeof(values) == 64) {
#if defined(__AVX512F__)
            return _mm512_stream_ps(reinterpret_cast<float*>(p), load<__m512>(values));
#endif
        } else if constexpr (sizeof(values) == 32) {
            return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), load<__m256i>(values));
        } else {
            return _mm_stream_si128(reinterpret_cast<__m128i*>(p), load<__m128i>(values));
        }
    }
#endif
    store_as(p, v, whole);
}
template <bool Stream, class S, class V>
inline __attribute__((always_inline)) void put(S* p, V v, Part part) {
    store_as(p, v, part);
}
template <bool Stream>
inline void stream_end() {
#if defined(__AVX2__)
    if constexpr (Stream) _mm_sfence();
#endif
}
template <class V>
inline __attribute__((always_inline)) V only(V v, Whole) {
    return v;
}
template <class V>
__attribute__((noinline)) V only(V v, Part part) {  // zero beyond the end
    for (int i = 0; i < static_cast<int>(sizeof(V) / 4); ++i) v[i] = i < part.count ? v[i] : 0;
    return v;
}

// Calls body(first element, Whole or Part) until `size` elements are covered.
template <class Body>
inline __attribute__((always_inline)) void for_vectors(int64_t size, const Body& body) {
    int64_t i = 0;
    for (; i + lanes <= size; i += lanes) body(i, Whole{});
    if (i < size) body(i, Part{size - i});
}

inline int64_t padded(int64_t size) {  // to whole vectors
    return (size + lanes - 1) / lanes * lanes;
}

template <class S>
inline void widen(const S* from, int64_t size, float add, float* to) {
    for_vectors(size, [&](int64_t i, auto part) { store(to + i, load_as<V>(from + i, part) + add); });
}

// Lane i of the result is the sum over the lanes of rows[i]. N vectors of N lanes; overwrites them.
template <int N, int H = N / 2, class V>
inline __attribute__((always_inline)) V reduce_add_each(V* rows) {
    using Lanes = std::make_integer_sequence<int, N>;
#pragma GCC unroll 8
    for (int i = 0; i < H; ++i) {
        const V a = rows[i], b = rows[i + H];
        rows[i] = exchange<H, false>(a, b, Lanes{}) + exchange<H, true>(a, b, Lanes{});
    }
    if constexpr (H > 1) return reduce_add_each<N, H / 2>(rows);
    return rows[0];
}

// out = the sum of `count` rows that lie `stride` apart, added from the first to the last.
template <class S>
inline void add_rows(const float* rows, int64_t count, int64_t stride, int64_t size, S* out) {
    for_vectors(size, [&](int64_t i, auto part) {
        V sum{};
        for (int64_t row = 0; row < count; ++row) sum += load_as<V>(rows + row * stride + i, part);
        store_as(out + i, sum, part);
    });
}

// Calls body(an element of the type that the dtype stands for).
template <class Body>
inline void with_type(var_ext::DType dtype, const Body& body) {
    switch (dtype) {
        case var_ext::DType::bfloat16:
            return body(BFloat16{});
        case var_ext::DType::float16:
            return body(Float16{});
        default:
            return body(0.0f);
    }
}

}  // namespace
