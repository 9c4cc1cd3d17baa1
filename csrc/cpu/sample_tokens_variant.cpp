// The body of sample_tokens, compiled once for each variant. ops/sample_tokens.h defines what it computes.
#include "cpu/sample_tokens.h"
#include "cpu/select.h"
#include "ops/sample_tokens_steps.h"

namespace {

using var_ext::SampleSettings;
using var_ext::SampleTokensParams;
using var_ext::cpu::sample_chunk;
using var_ext::cpu::SampleRow;
using var_ext::cpu::SampleScratch;

constexpr float sample_infinity = __builtin_inff();
constexpr float any_finite = -3.40282347e38f;  // as a lower bound: lets all finite numbers pass

// The integer nearest to 2^30 e^x for x <= 0, up to the 2 units in the last place of the fp32 polynomial.
inline __attribute__((always_inline)) Ints sample_weight(Floats x) {
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
    const Floats scale = (Floats)(((Ints)shifted + (127 + 30 - 0x4b400000)) << 23);  // 2^(k + 30)
    return __builtin_convertvector(p * scale + 0.5f, Ints);                          // at most 2^30
}

// Logits of one row in fp32 with guidance; -inf fills the last vector. False if the row is no distribution.
template <bool Guided, class T>
bool sample_mix(int64_t size, const SampleSettings& settings, const T* cond, const T* uncond, float* row,
                float* largest) {
    constexpr int n = lanes;
    const float cond_factor = settings.cond_factor, uncond_factor = settings.uncond_factor;
    Floats most = Floats{} - sample_infinity;
    Ints nan = {};
    const auto mix = [&](const T* c, const T* u, float* to) __attribute__((always_inline)) {
        Floats x = load_as<Floats>(c);
        __builtin_prefetch(c + size, 0,
                           2);  // most likely the next row: memory works while this one is computed
        if constexpr (Guided) {
            __builtin_prefetch(u + size, 0, 2);
            const Floats mixed = x * cond_factor - load_as<Floats>(u) * uncond_factor;
            x = x == -sample_infinity ? x : mixed;
        }
        most = x > most ? x : most;
        nan |= x != x;
        store(to, x);
    };
    int64_t i = 0;
    for (; i + n <= size; i += n) mix(cond + i, uncond + i, row + i);
    if (i < size) {
        T last[2][n];
        for (int64_t j = 0; j < n; ++j) {  // the last element again and again
            last[0][j] = cond[i + j < size ? i + j : size - 1];
            last[1][j] = uncond[i + j < size ? i + j : size - 1];
        }
        mix(last[0], last[1], row + i);
        for (int64_t j = size; j < i + n; ++j) row[j] = -sample_infinity;
    }
    *largest = most[0];
    bool fine = true;
    for (int j = 0; j < n; ++j) {
        if (most[j] > *largest) *largest = most[j];
        fine &= nan[j] == 0;
    }
    return fine && *largest >= any_finite && *largest < sample_infinity;
}

// The index of the element that has `before` others of at least `bound` in front of it.
inline int64_t sample_position(const float* row, float bound, int64_t before) {
    for (int64_t i = 0;; i += lanes) {
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

// The first index whose prefix sum of weights of at least `bound` exceeds the word's share of all.
inline int64_t sample_draw(const int32_t* weights, int64_t count, int32_t bound, uint32_t word,
                           uint64_t* sums) {
    uint64_t total = 0;
    for (int64_t first = 0; first < count; first += sample_chunk) {
        MassSum mass;
        const int64_t end = first + sample_chunk < count ? first + sample_chunk : count;
        for (int64_t i = first; i < end; i += lanes) {
            const Ints w = load<Ints>(weights + i);
            mass.add(where(at_least(w, Ints{} + bound), w));
        }
        sums[first / sample_chunk] = total += mass.total();
    }
    const uint64_t target = sample_target(word, total);
    int64_t chunk = 0;
    while (sums[chunk] <= target) ++chunk;
    uint64_t sum = chunk == 0 ? 0 : sums[chunk - 1];
    for (int64_t i = chunk * sample_chunk;; ++i) {
        sum += weights[i] >= bound ? weights[i] : 0;
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
    float largest;
    const bool fine =
        p.guided ? sample_mix<true>(p.v, r.settings, cond, sample_contiguous<T>(r.uncond, p, s.uncond_copy),
                                    s.row, &largest)
                 : sample_mix<false>(p.v, r.settings, cond, cond, s.row, &largest);
    if (!fine) return -1;

    float bound = any_finite;
    if (prefilter > 0) {
        const float guess = pivot_of<32>(s.row, p.v, (static_cast<float>(prefilter) + 0.5f) / 32, true);
        bound = guess > any_finite ? guess : any_finite;
    }
    int64_t count = keep_from(s.row, p.v, bound, s.list);
    if (count < r.settings.top_k && bound > any_finite) {  // the guess was too high
        bound = any_finite;
        count = keep_from(s.row, p.v, bound, s.list);
    }
    if (r.settings.top_k > 0 && count > r.settings.top_k) {
        bound = mass_threshold(s.list, count, count, r.settings.top_k, s.work);
        count = keep_from(s.list, count, bound, s.list);
    }

    for (int64_t i = 0; i < count; i += lanes) {
        const Floats x = load<Floats>(s.list + i);
        store(s.weights + i,
              sample_weight(x < largest ? x - largest : Floats{}));  // a number for NaN as well
    }
    pad(s.weights + count);
    int32_t lowest = 0;
    if (r.settings.top_p > 0) {
        MassSum mass;
        for (int64_t i = 0; i < count; i += lanes) mass.add(load<Ints>(s.weights + i));
        const uint64_t total = mass.total();
        lowest =
            mass_threshold(s.weights, count, total, sample_need(r.settings.top_p, total), s.work_weights);
    }
    return sample_position(s.row, bound, sample_draw(s.weights, count, lowest, r.word, s.sums));
}

}  // namespace

namespace var_ext::cpu {

VAR_EXT_DEFINE_VARIANT(SampleTokensKernel, sample_tokens) = {
    sample_tokens_draw<float>, sample_tokens_draw<BFloat16>, sample_tokens_draw<Float16>};

}  // namespace var_ext::cpu
