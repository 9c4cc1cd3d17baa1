// Selection without sorting, on packed lists of fp32 values or of integer weights; the rules of vec.h hold
// here.
#pragma once

#include "cpu/vec.h"

namespace {

// Lanes picked by a comparison: a mask register where there is one, else all bits of a lane.
using Floats = Vec<float, lanes_of<float>>;
using Ints = Vec<int32_t, lanes_of<float>>;

#if defined(__AVX512F__)
using Mask = __mmask16;
inline __attribute__((always_inline)) Mask greater(Floats a, Floats b) {
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
}
inline __attribute__((always_inline)) Mask at_least(Floats a, Floats b) {
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
}
inline __attribute__((always_inline)) Mask equal(Floats a, Floats b) {
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ);
}
inline __attribute__((always_inline)) Mask equal(Ints a, Ints b) {
    return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b);
}
inline __attribute__((always_inline)) Mask greater(Ints a, Ints b) {
    return _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b);
}
inline __attribute__((always_inline)) Mask at_least(Ints a, Ints b) {
    return _mm512_cmpge_epi32_mask((__m512i)a, (__m512i)b);
}
inline __attribute__((always_inline)) int count(Mask mask) {
    return __builtin_popcount(mask);
}
inline __attribute__((always_inline)) Ints where(Mask mask, Ints v) {  // 0 elsewhere
    return (Ints)_mm512_maskz_mov_epi32(mask, (__m512i)v);
}
// The picked lanes of v, side by side from p on; up to a whole vector is written. Count them with count().
template <class T, class V>
inline __attribute__((always_inline)) void compress_store(T* p, Mask mask, V v) {
    store(p, _mm512_maskz_compress_epi32(mask, (__m512i)v));
}
#else
using Mask = decltype(Floats{} > Floats{});
template <class V>
inline __attribute__((always_inline)) Mask greater(V a, V b) {
    return a > b;
}
template <class V>
inline __attribute__((always_inline)) Mask at_least(V a, V b) {
    return a >= b;
}
template <class V>
inline __attribute__((always_inline)) Mask equal(V a, V b) {
    return a == b;
}
inline __attribute__((always_inline)) Ints where(Mask mask, Ints v) {
    return mask & v;
}
#if defined(__AVX2__)
struct CompressTable {  // for each mask of 8 lanes the picked lane numbers, a byte each
    uint64_t lanes[256];
    constexpr CompressTable() : lanes() {
        for (unsigned mask = 0; mask < 256; ++mask) {
            int at = 0;
            for (uint64_t lane = 0; lane < 8; ++lane) {
                if (mask >> lane & 1) lanes[mask] |= lane << (8 * at++);
            }
        }
    }
};
constexpr CompressTable compress_table;
inline __attribute__((always_inline)) int count(Mask mask) {
    return __builtin_popcount(_mm256_movemask_ps((__m256)mask));
}
template <class T, class V>
inline __attribute__((always_inline)) void compress_store(T* p, Mask mask, V v) {
    const long long lanes = compress_table.lanes[_mm256_movemask_ps((__m256)mask)];
    const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(lanes));
    store(p, _mm256_permutevar8x32_epi32((__m256i)v, order));
}
#else
inline __attribute__((always_inline)) int count(Mask mask) {
    return -(mask[0] + mask[1] + mask[2] + mask[3]);
}
template <class T, class V>
inline __attribute__((always_inline)) void compress_store(T* p, Mask mask, V v) {
    for (int i = 0; i < 4; ++i) {
        __builtin_memcpy(p, (const char*)&v + 4 * i, 4);
        p -= mask[i];
    }
}
#endif
#endif

constexpr int lanes = lanes_of<float>;

// Sums of 32-bit weights, in 64 bits.
struct MassSum {
    using Wide = Vec<uint64_t, lanes / 2>;
    Wide even = {}, odd = {};

    inline __attribute__((always_inline)) void add(Ints w) {
        even += (Wide)w & 0xffffffff;
        odd += (Wide)w >> 32;
    }
    inline __attribute__((always_inline)) uint64_t total() const {
        const Wide both = even + odd;
        uint64_t sum = 0;
        for (int i = 0; i < lanes / 2; ++i) sum += both[i];
        return sum;
    }
};

// What stands beside the sum of a list's elements above a threshold: one each for logits (top-k), the weight
// itself for weights (top-p).
inline __attribute__((always_inline)) float mass_of(float) {
    return 1;
}
inline __attribute__((always_inline)) float mass_of(int32_t weight) {
    return static_cast<float>(weight);
}

// Fills the last vector of a list: NaN passes no comparison, a weight of 0 has no part in a sum.
inline __attribute__((always_inline)) void pad(float* end) {
    store(end, Floats{} + __builtin_nanf(""));
}
inline __attribute__((always_inline)) void pad(int32_t* end) {
    store(end, Ints{});
}

// Of N elements spread over the list, the one nearest to having this share of their mass, or of their number,
// above it.
template <int N, class E>
E pivot_of(const E* list, int64_t size, float share, bool by_number) {
    using V = Vec<E, lanes>;
    E element[N];
    float mass[N], above[N], total = 0;
    for (int i = 0; i < N; ++i) {
        element[i] = list[i * size / N];
        mass[i] = by_number ? 1 : mass_of(element[i]);
        total += mass[i];
    }
    for (int i = 0; i < N; i += lanes) {
        const V v = load<V>(element + i);
        Floats sum = load<Floats>(mass + i) * 0.5f;
        for (int j = 0; j < N; ++j) sum += v < element[j] ? Floats{} + mass[j] : Floats{};
        store(above + i, sum);
    }
    int best = 0;
    float nearest = __builtin_inff();
    for (int i = 0; i < N; ++i) {
        const float distance = __builtin_fabsf(above[i] - share * total);
        best = distance < nearest ? i : best;
        nearest = distance < nearest ? distance : nearest;
    }
    return element[best];
}

// The smallest element with less than `need` mass above it; the list's mass is `total`, 1 <= need <= total.
// Quickselect, into `work` from the second round on. Padding fills the last vector.
template <class E>
E mass_threshold(const E* list, int64_t size, uint64_t total, uint64_t need, E* work) {
    using V = Vec<E, lanes>;
    constexpr bool weighted = E(0.5f) == 0;  // an integer
    bool halve = false;
    for (;;) {
        const float share = static_cast<float>(need) / static_cast<float>(total);
        const E pivot = pivot_of<16>(list, size, halve ? 0.5f : share, halve);
        const V split = V{} + pivot;
        uint64_t above = 0, same = 0;
        MassSum mass;
        for (int64_t i = 0; i < size; i += lanes) {
            const V v = load<V>(list + i);
            const Mask higher = greater(v, split);
            if constexpr (weighted) {
                mass.add(where(higher, v));
            } else {
                above += count(higher);
            }
            same += count(equal(v, split));
        }
        if constexpr (weighted) {
            above = mass.total();
            same *= static_cast<uint64_t>(pivot);
        }
        const bool up = above >= need;
        if (!up && above + same >= need) return pivot;
        if (up) {
            total = above;
        } else {
            total -= above + same;
            need -= above + same;
        }
        int64_t kept = 0;
        for (int64_t i = 0; i < size; i += lanes) {
            const V v = load<V>(list + i);
            const Mask mask = up ? greater(v, split) : greater(split, v);
            compress_store(work + kept, mask, v);
            kept += count(mask);
        }
        if (weighted && !up) kept -= -size & (lanes - 1);  // the padding, which is below any pivot
        pad(work + kept);
        halve =
            2 * kept > size;  // the samples mislead, as where they miss the one element with most of the mass
        list = work;
        size = kept;
    }
}

// The values of at least `bound`, in order, a NaN vector behind them. `to` may be `from`.
inline int64_t keep_from(const float* from, int64_t size, float bound, float* to) {
    int64_t kept = 0;
    for (int64_t i = 0; i < size; i += lanes) {
        const Floats x = load<Floats>(from + i);
        const Mask mask = at_least(x, Floats{} + bound);
        compress_store(to + kept, mask, x);
        kept += count(mask);
    }
    pad(to + kept);
    return kept;
}

}  // namespace
