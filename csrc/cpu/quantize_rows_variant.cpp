// The body of quantize_rows, compiled once for each variant, without fused multiplication and addition.
#include "cpu/quantize_rows.h"
#include "cpu/rows.h"
#include "ops/quantize_rows_steps.h"

namespace {

using Params = var_ext::QuantizeRowsParams;

// Magnitudes of S as integers, which have the same order: they are compared as they lie in memory.
template <class S>
using Magnitude = std::conditional_t<sizeof(S) == 2, int16_t, int32_t>;

// See larger() of math.h.
template <class M>
inline __attribute__((always_inline)) M larger_of(M a, M b) {
#if defined(__AVX512F__)
    return sizeof(a[0]) == 2 ? (M)_mm512_maskz_max_epi16(~0u, (__m512i)a, (__m512i)b)
                             : (M)_mm512_maskz_max_epi32(0xffff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sizeof(a[0]) == 2 ? (M)_mm256_max_epi16((__m256i)a, (__m256i)b)
                             : (M)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    return a > b ? a : b;
#endif
}

// The largest over the lanes.
template <int Shift, class M>
inline __attribute__((always_inline)) auto largest_lane(M v) {
    using Lanes = std::make_integer_sequence<int, sizeof(M) / sizeof(v[0])>;
    if constexpr (Shift == 0) {
        return v[0];
    } else {
        return largest_lane<Shift / 2>(larger_of(v, rotated<Shift>(v, Lanes{})));
    }
}

// The bits of the largest |x|, as float32.
template <class S>
uint32_t largest_of(const S* x, int64_t size) {
    using E = Magnitude<S>;
    constexpr int n = lanes_of<E>;
    using M = Vec<E, n>;
    constexpr E sign_off = sizeof(E) == 2 ? 0x7fff : 0x7fffffff;
    M most = {};
    int64_t i = 0;
    for (; i + n <= size; i += n) most = larger_of(most, load<M>(x + i) & sign_off);
    if (i < size) {
        E rest[n] = {};
        __builtin_memcpy(rest, x + i, (size - i) * sizeof(S));
        most = larger_of(most, load<M>(rest) & sign_off);
    }
    const E largest = largest_lane<n / 2>(most);
    S one[lanes] = {};
    __builtin_memcpy(one, &largest, sizeof(S));
    const float wide = load_as<V>(one)[0];
    uint32_t bits;
    __builtin_memcpy(&bits, &wide, 4);
    return bits;
}

// The lower halves of the elements of a and then of b, which are twice as wide as E; bytes lie as on x86 and
// ARM.
template <class E, class A, int... I>
inline __attribute__((always_inline)) auto halves(A a, A b, std::integer_sequence<int, I...>) {
    using H = Vec<E, lanes_of<E>>;
    return shuffle((H)a, (H)b, std::integer_sequence<int, 2 * I...>{});
}
template <class E, class A>
inline __attribute__((always_inline)) auto halves(A a, A b) {
    return halves<E>(a, b, std::make_integer_sequence<int, lanes_of<E>>{});
}

// The bytes of `size` elements; the lowest byte of each sum is what is wanted.
template <class S>
void quantize(const S* x, int64_t size, float inverse, uint8_t* q) {
    const auto shifted = [&](const S* from) { return load_as<V>(from) * inverse + quantize_shift; };
    int64_t i = 0;
    for (; i + 4 * lanes <= size; i += 4 * lanes) {
        const auto first = halves<uint16_t>(shifted(x + i), shifted(x + i + lanes));
        const auto second = halves<uint16_t>(shifted(x + i + 2 * lanes), shifted(x + i + 3 * lanes));
        store(q + i, halves<uint8_t>(first, second));
    }
    for (; i < size; i += lanes) {
        const int64_t count = smaller(size - i, lanes);
        S values[lanes] = {};
        uint32_t sums[lanes];
        __builtin_memcpy(values, x + i, count * sizeof(S));
        store(sums, shifted(values));
        for (int64_t j = 0; j < count; ++j) q[i + j] = static_cast<uint8_t>(sums[j]);
    }
}

void run(const Params& p, int64_t begin, int64_t end) {
    with_type(p.dtype, [&](auto type) {
        using S = decltype(type);
        for (int64_t row = begin; row < end; ++row) {
            const S* x = static_cast<const S*>(p.x) + row * p.x_stride;
            uint8_t* q = p.q + row * p.channels;
            const QuantizedRow to = quantized_row(largest_of(x, p.channels));
            p.scale[row] = to.scale;
            if (to.finite) {
                quantize(x, p.channels, to.inverse, q);
            } else {
                __builtin_memset(q, quantize_zero, p.channels);
            }
        }
    });
}

}  // namespace

namespace var_ext::cpu {

VAR_EXT_DEFINE_VARIANT(QuantizeRowsKernel, quantize_rows) = {run};

}  // namespace var_ext::cpu
