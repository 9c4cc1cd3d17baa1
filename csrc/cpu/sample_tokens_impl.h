// The body of sample_tokens, compiled once for each variant. ops/sample_tokens.h defines what it computes.
#pragma once

#include "cpu/sample_tokens.h"
#include "cpu/vec.h"

namespace {

using var_ext::SampleTokensParams;
using var_ext::cpu::sample_chunk;
using var_ext::cpu::SampleRow;
using var_ext::cpu::SampleScratch;

constexpr int sample_lanes = lanes_of<float>;
constexpr float sample_infinity = __builtin_inff();
constexpr float any_finite = -3.40282347e38f;  // as a lower bound: lets all finite numbers pass

// The integer nearest to 2^30 e^x for x <= 0, up to the 2 units in the last place of the fp32 polynomial.
inline __attribute__((always_inline)) Words sample_weight(Floats x) {
    using I = Vec<int32_t, sample_lanes>;
    const Floats bounded = x < -24.0f ? Floats{} - 24.0f : x;
    // x = k ln 2 + r, |r| <= ln 2 / 2: adding 1.5 * 2^23 rounds to the integer k, left in the low bits
    const Floats shifted = bounded * 1.44269504f + 12582912.0f;
    const Floats k = shifted - 12582912.0f;
    const Floats r = (bounded - k * 0.693359375f) + k * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    const Floats scale = (Floats)(((I)shifted + (127 + 30 - 0x4b400000)) << 23);  // 2^(k + 30)
    return (Words) __builtin_convertvector(p * scale + 0.5f, I);                  // at most 2^30
}

// Sums of 32-bit weights, in 64 bits.
struct SampleMass {
    using Wide = Vec<uint64_t, sample_lanes / 2>;
    Wide even = {}, odd = {};

    inline __attribute__((always_inline)) void add(Words w) {
        even += (Wide)w & 0xffffffff;
        odd += (Wide)w >> 32;
    }
    inline __attribute__((always_inline)) uint64_t total() const {
        const Wide both = even + odd;
        uint64_t sum = 0;
        for (int i = 0; i < sample_lanes / 2; ++i) sum += both[i];
        return sum;
    }
};

// Logits of one row in fp32 with guidance; -inf fills the last vector. False if the row is no distribution.
template <class T>
bool sample_mix(const SampleTokensParams& p, const T* cond, const T* uncond, float* row, float* largest) {
    constexpr int n = sample_lanes;
    Floats most = Floats{} - sample_infinity;
    Vec<int32_t, n> nan = {};
    const auto mix = [&](const T* c, const T* u) __attribute__((always_inline)) {
        Floats x = load_as<Floats>(c);
        if (p.guided) {
            const Floats mixed = x * p.cond_factor - load_as<Floats>(u) * p.uncond_factor;
            x = x == -sample_infinity ? x : mixed;
        }
        return x;
    };
    int64_t i = 0;
    for (; i + n <= p.v; i += n) {
        const Floats x = mix(cond + i, uncond + i);
        most = x > most ? x : most;
        nan |= x != x;
        store(row + i, x);
    }
    if (i < p.v) {
        T last[2][n];
        for (int64_t j = 0; j < n; ++j) {  // repeats the last element
            last[0][j] = cond[i + j < p.v ? i + j : p.v - 1];
            last[1][j] = uncond[i + j < p.v ? i + j : p.v - 1];
        }
        const Floats x = mix(last[0], last[1]);
        most = x > most ? x : most;
        nan |= x != x;
        store(row + i, x);
        for (int64_t j = p.v; j < i + n; ++j) row[j] = -sample_infinity;
    }
    *largest = most[0];
    bool fine = true;
    for (int j = 0; j < n; ++j) {
        if (most[j] > *largest) *largest = most[j];
        fine &= nan[j] == 0;
    }
    return fine && *largest >= any_finite && *largest < sample_infinity;
}

// Of N values spread over the list, the one nearest to having this share of their mass above it.
template <int N, bool Weighted>
float sample_pivot(const float* values, const uint32_t* weights, int64_t count, float share) {
    constexpr int n = sample_lanes;
    float value[N], weight[N], above[N], total = 0;
    for (int i = 0; i < N; ++i) {
        const int64_t at = i * count / N;
        value[i] = values[at];
        weight[i] = Weighted ? static_cast<float>(weights[at]) : 1.0f;
        total += weight[i];
    }
    for (int i = 0; i < N; i += n) {
        const Floats v = load<Floats>(value + i);
        Floats sum = load<Floats>(weight + i) * 0.5f;
        for (int j = 0; j < N; ++j) sum += v < value[j] ? Floats{} + weight[j] : Floats{};
        store(above + i, sum);
    }
    int best = 0;
    float nearest = sample_infinity;
    for (int i = 0; i < N; ++i) {
        const float distance = __builtin_fabsf(above[i] - share * total);
        best = distance < nearest ? i : best;
        nearest = distance < nearest ? distance : nearest;
    }
    return value[best];
}

// The smallest of the values that has less than `need` mass above it; the mass of all is `total`, 1 <= need
// <= total. Quickselect. A NaN stands behind the values and up to the next full vector: no comparison picks
// it.
template <bool Weighted>
float sample_threshold(const float* values, const uint32_t* weights, int64_t count_, uint64_t total,
                       uint64_t need, const SampleScratch& s) {
    constexpr int n = sample_lanes;
    int64_t left = count_;
    for (;;) {
        const float share = static_cast<float>(need) / static_cast<float>(total);
        const float pivot = sample_pivot<16, Weighted>(values, weights, left, share);
        const Floats split = Floats{} + pivot;
        uint64_t above = 0, same = 0;
        if constexpr (Weighted) {
            SampleMass over, equal;
            for (int64_t i = 0; i < left; i += n) {
                const Floats x = load<Floats>(values + i);
                const Words w = load<Words>(weights + i);
                over.add(where(greater(x, split), w));
                equal.add(where(at_least(x, split), w));
            }
            above = over.total();
            same = equal.total() - above;
        } else {
            for (int64_t i = 0; i < left; i += n) {
                const Floats x = load<Floats>(values + i);
                above += count(greater(x, split));
                same += count(at_least(x, split));
            }
            same -= above;
        }
        const bool higher = above >= need;
        if (!higher && above + same >= need) return pivot;
        if (higher) {
            total = above;
        } else {
            total -= above + same;
            need -= above + same;
        }
        int64_t kept = 0;
        for (int64_t i = 0; i < left; i += n) {
            const Floats x = load<Floats>(values + i);
            const Mask mask = higher ? greater(x, split) : greater(split, x);
            if constexpr (Weighted) compress_store(s.work_weights + kept, mask, load<Words>(weights + i));
            compress_store(s.work + kept, mask, x);
            kept += count(mask);
        }
        store(s.work + kept, Floats{} + __builtin_nanf(""));
        if constexpr (Weighted) store(s.work_weights + kept, Words{});
        values = s.work;
        weights = s.work_weights;
        left = kept;
    }
}

// The values of at least `bound`, in order, a NaN vector behind them. `to` may be `from`.
inline int64_t sample_filter(const float* from, int64_t size, float bound, float* to) {
    int64_t kept = 0;
    for (int64_t i = 0; i < size; i += sample_lanes) {
        const Floats x = load<Floats>(from + i);
        const Mask mask = at_least(x, Floats{} + bound);
        compress_store(to + kept, mask, x);
        kept += count(mask);
    }
    store(to + kept, Floats{} + __builtin_nanf(""));
    return kept;
}

// The index of the element that has `before` others of at least `bound` in front of it.
inline int64_t sample_position(const float* row, float bound, int64_t before) {
    for (int64_t i = 0;; i += sample_lanes) {
        const int here = count(at_least(load<Floats>(row + i), Floats{} + bound));
        if (before >= here) {
            before -= here;
            continue;
        }
        for (;; ++i) {
            if (row[i] >= bound && before-- == 0) return i;
        }
    }
}

// floor((word + 1/2) total / 2^32) for a total below 2^62
inline uint64_t sample_target(uint32_t word, uint64_t total) {
    const uint64_t half = total / 2, low = (total & 0xffffffff) * word + (half & 0xffffffff);
    return (total >> 32) * word + (half >> 32) + (low >> 32);
}

// The first index whose prefix sum of weights, over values of at least `bound`, exceeds the word's share.
inline int64_t sample_draw(int64_t count, float bound, uint32_t word, const SampleScratch& s) {
    uint64_t total = 0;
    for (int64_t first = 0; first < count; first += sample_chunk) {
        SampleMass mass;
        const int64_t end = first + sample_chunk < count ? first + sample_chunk : count;
        for (int64_t i = first; i < end; i += sample_lanes) {
            const Mask mask = at_least(load<Floats>(s.list + i), Floats{} + bound);
            mass.add(where(mask, load<Words>(s.weights + i)));
        }
        s.sums[first / sample_chunk] = total += mass.total();
    }
    const uint64_t target = sample_target(word, total);
    int64_t chunk = 0;
    while (s.sums[chunk] <= target) ++chunk;
    uint64_t sum = chunk == 0 ? 0 : s.sums[chunk - 1];
    for (int64_t i = chunk * sample_chunk;; ++i) {
        sum += s.list[i] >= bound ? s.weights[i] : 0;
        if (sum > target) return i;
    }
}

template <class T>
const T* sample_contiguous(const void* from, const SampleTokensParams& p, void* copy) {
    const T* given = static_cast<const T*>(from);
    if (p.logits_stride_v == 1) return given;
    T* to = static_cast<T*>(copy);
    for (int64_t i = 0; i < p.v; ++i) to[i] = given[i * p.logits_stride_v];
    return to;
}

template <class T>
int64_t sample_tokens_draw(const SampleTokensParams& p, const SampleRow& r, const SampleScratch& s,
                           int prefilter) {
    const T* cond = sample_contiguous<T>(r.cond, p, s.cond_copy);
    const T* uncond = p.guided ? sample_contiguous<T>(r.uncond, p, s.uncond_copy) : cond;
    float largest;
    if (!sample_mix(p, cond, uncond, s.row, &largest)) return -1;

    float bound = any_finite;
    if (prefilter > 0) {
        const float guess = sample_pivot<32, false>(s.row, nullptr, p.v, (prefilter + 0.5f) / 32);
        bound = guess > any_finite ? guess : any_finite;
    }
    int64_t count = sample_filter(s.row, p.v, bound, s.list);
    if (count < p.top_k && bound > any_finite) {  // the guess was too high
        bound = any_finite;
        count = sample_filter(s.row, p.v, bound, s.list);
    }
    if (p.top_k > 0 && count > p.top_k) {
        bound = sample_threshold<false>(s.list, nullptr, count, count, p.top_k, s);
        count = sample_filter(s.list, count, bound, s.list);
    }

    SampleMass mass;
    store(s.list + count, Floats{} + largest);  // any number: its weight is struck out below
    for (int64_t i = 0; i < count; i += sample_lanes) {
        store(s.weights + i, sample_weight(load<Floats>(s.list + i) - largest));
    }
    store(s.list + count, Floats{} + __builtin_nanf(""));
    store(s.weights + count, Words{});
    for (int64_t i = 0; i < count; i += sample_lanes) mass.add(load<Words>(s.weights + i));

    float lowest = any_finite;
    if (p.top_p > 0) {
        const uint64_t total = mass.total();
        const auto drop = static_cast<uint64_t>((1 - p.top_p) * static_cast<double>(total));
        const uint64_t need = drop < total ? total - drop : 1;
        lowest = sample_threshold<true>(s.list, s.weights, count, total, need, s);
    }
    const int64_t drawn = sample_draw(count, lowest, r.word, s);
    return sample_position(s.row, bound, drawn);
}

}  // namespace
