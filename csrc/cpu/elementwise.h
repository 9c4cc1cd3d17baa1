// Loops over elements of any dtype and number, in vectors of float32; rules as in vec.h.
#pragma once

#include "common/dtype.h"
#include "cpu/vec.h"

namespace {

using var_ext::DType;

constexpr int lanes = lanes_of<float>;
using V = Vec<float, lanes>;

inline int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// Whether a result stored as S may be computed to fewer digits than float32 has.
template <class S>
constexpr bool rough = sizeof(S) == 2;

// The first n elements, 0 <= n <= lanes, the other lanes 0; and back. The whole vector is the fast way.
template <class V, class S>
inline __attribute__((always_inline)) V load_some(const S* p, int64_t n) {
    constexpr int lanes = sizeof(V) / 4;
    if (n == lanes) return load_as<V>(p);
    S part[lanes] = {};
    for (int64_t i = 0; i < n; ++i) part[i] = p[i];
    return load_as<V>(part);
}
template <class V, class S>
inline __attribute__((always_inline)) void store_some(S* p, V v, int64_t n) {
    constexpr int lanes = sizeof(V) / 4;
    if (n == lanes) return store_as(p, v);
    S part[lanes];
    store_as(part, v);
    for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

// Calls body(i, width) for each vector of n elements: with width a constant for whole vectors, so that loads
// and stores of them know, and an int64_t for the rest.
struct Whole {
    constexpr operator int64_t() const { return lanes; }
};
template <class Body>
inline __attribute__((always_inline)) void for_vectors(int64_t n, const Body& body) {
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) body(i, Whole{});
    if (i < n) body(i, n - i);
}

template <class Body>
void by_dtype(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::bfloat16:
            return body(BFloat16{});
        case DType::float16:
            return body(Float16{});
        default:
            return body(float{});
    }
}

}  // namespace
