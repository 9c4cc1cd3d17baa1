// The body of keyed_dropout, compiled once for each variant.
#include "common/splitmix64.h"
#include "cpu/keyed_dropout.h"
#include "cpu/rows.h"

namespace {

using Params = var_ext::KeyedDropoutParams;
using var_ext::splitmix64;

constexpr int words = lanes_of<uint64_t>;  // of a vector: 16 bits for each element of two vectors of float32
using Words = Vec<uint64_t, words>;

// Of a row: word i is the hash of origin + step (i + 1).
struct Counter {
    uint64_t origin, step;
};

inline Words count_from(uint64_t begin, uint64_t step) {
    Words found;
    for (int i = 0; i < words; ++i) found[i] = begin + i * step;
    return found;
}

// What elements are multiplied by, of their bits. A dropped one is not replaced: 0 times NaN stays NaN.
inline __attribute__((always_inline)) V factors(const Params& p, const int16_t* halves) {
    using I = Vec<int32_t, lanes>;
#if defined(__AVX512F__)  // GCC 12 would convert halves and join them
    const I bits = (I)_mm512_maskz_cvtepi16_epi32(0xffff, load<__m256i>(halves));
#else
    const I bits = __builtin_convertvector(load<Vec<int16_t, lanes> >(halves), I);
#endif
    return bits < p.threshold ? V{} + p.scale : V{};
}

// Elements [begin, end) whose numbers follow each other as they do: a word for four.
template <bool Stream, class S>
void in_order(const Params& p, const S* x, S* out, Counter counter, int64_t begin, int64_t end) {
    constexpr int64_t block = 4 * words;
    Words counted = count_from(counter.origin + (begin / 4 + 1) * counter.step, counter.step);
    const auto apply = [&](int64_t first, int64_t size) __attribute__((always_inline)) {
        int16_t halves[block];
        store(halves, splitmix64(counted));
        for_vectors(size, [&](int64_t i, auto part) {
            put<Stream>(out + first + i, load_as<V>(x + first + i, part) * factors(p, halves + i), part);
        });
        counted += words * counter.step;
    };
    int64_t i = begin;
    for (; i + block <= end; i += block) apply(i, block);
    if (i < end) apply(i, end - i);
}

// Pixels [begin, end) of one channel, whose numbers are `channels` apart: a word for each.
template <bool Stream, class S>
void of_channel(const Params& p, const S* x, S* out, Counter counter, int64_t channel, int64_t begin,
                int64_t end) {
    const uint64_t channels = p.channels;
    Words number = count_from(begin * channels + channel, channels);
    for_vectors(end - begin, [&](int64_t i, auto part) {
        int16_t halves[lanes];
        for (int j = 0; j < lanes; j += words) {
            const Words word = splitmix64(counter.origin + ((number >> 2) + 1) * counter.step);
            store(halves + j, __builtin_convertvector(word >> ((number & 3) << 4), Vec<int16_t, words>));
            number += words * channels;
        }
        put<Stream>(out + begin + i, load_as<V>(x + begin + i, part) * factors(p, halves), part);
    });
}

template <bool Stream>
void run_row(const Params& p, int64_t row, int64_t begin, int64_t end) {
    const uint64_t first = p.counter[0], step = p.counter[1];
    const Counter counter = {static_cast<uint64_t>(p.keys[row]) + first, step};
    with_type(p.dtype, [&](auto type) {
        using S = decltype(type);
        const S* x = static_cast<const S*>(p.x) + row * p.size;
        S* out = static_cast<S*>(p.out) + row * p.size;
        if (p.channels == 1) return in_order<Stream>(p, x, out, counter, begin, end);
        const int64_t pixels = p.size / p.channels;
        for (int64_t channel = begin / pixels; channel * pixels < end; ++channel) {
            const int64_t map = channel * pixels, from = begin > map ? begin - map : 0;
            of_channel<Stream>(p, x + map, out + map, counter, channel, from, smaller(pixels, end - map));
        }
    });
    stream_end<Stream>();
}

void run(const Params& p, int64_t row, int64_t begin, int64_t end, bool stream) {
    stream ? run_row<true>(p, row, begin, end) : run_row<false>(p, row, begin, end);
}

}  // namespace

namespace var_ext::cpu {

VAR_EXT_DEFINE_VARIANT(KeyedDropoutKernel, keyed_dropout) = {run};

}  // namespace var_ext::cpu
