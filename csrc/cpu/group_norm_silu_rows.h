// group_norm_silu for channels-last maps: a row is a pixel, a lane is a channel.
#pragma once

#include "cpu/group_norm_silu_common.h"

namespace {

template <class S>
struct Rows {
    const S *x, *grad;
    S* out;
    int64_t channels, padded;
    // Rows whose column of a vector's width is taken at a time: it saves loads of coefficients. What comes
    // from memory is read row by row: the processor fetches ahead along one stream, and jumps halve its pace
    // or worse.
    int64_t together;

    Rows(const Params& p, int64_t image)
        : x(static_cast<const S*>(p.x)),
          grad(static_cast<const S*>(p.grad)),
          out(static_cast<S*>(p.out)),
          channels(p.channels),
          padded(coef::padded_channels(p.channels)),
          together(p.pixels * p.channels * sizeof(S) <= 1024 * 1024 ? 16 : 1) {
        const int64_t offset = image * p.pixels * p.channels;
        x += offset;
        grad += p.grad ? offset : 0;
        out += offset;
    }
    Channel channel(const float* of, int64_t c) const {
        return {load<V>(of + coef::mean * padded + c), load<V>(of + coef::rstd * padded + c),
                load<V>(of + coef::weight * padded + c), load<V>(of + coef::bias * padded + c)};
    }
};

void row_shift(const Params& p, int64_t image, const float* input_bias, float* shift) {
    with_type(p.dtype, [&](auto type) {
        using S = decltype(type);
        const Rows<S> rows(p, image);
        const int64_t samples = smaller(sample, p.pixels), step = p.pixels / samples * p.channels;
        for_vectors(p.channels, [&](int64_t c, auto part) {
            V total = {};
            for (int64_t i = 0; i < samples; ++i) total += load_as<V>(rows.x + i * step + c, part);
            store(shift + c, total);
        });
    });
    const int64_t per_group = p.channels / p.groups;
    const float count = static_cast<float>(per_group * smaller(sample, p.pixels));
    for (int64_t begin = 0; begin < p.channels; begin += per_group) {
        float total = 0, add = 0;
        for (int64_t c = begin; c < begin + per_group; ++c) {
            total += shift[c];
            add += input_bias[c];
        }
        const float rough = total / count + add / static_cast<float>(per_group);
        for (int64_t c = begin; c < begin + per_group; ++c) shift[c] = rough - input_bias[c];
    }
}

// Walks over rows [begin, end), so many together, and calls body(first row, last, channel, part).
template <class Body>
inline __attribute__((always_inline)) void for_blocks(int64_t begin, int64_t end, int64_t rows,
                                                      int64_t channels, const Body& body) {
    for (int64_t first = begin; first < end; first += rows) {
        const int64_t last = smaller(first + rows, end);
        for_vectors(channels, [&](int64_t c, auto part) { body(first, last, c, part); });
    }
}

// Sums of two terms over rows, for each channel: (2, padded).
inline void clear(float* sums, int64_t padded) {
    for (int64_t c = 0; c < 2 * padded; c += lanes) store(sums + c, V{});
}
inline void add(float* sums, V a, V b, int64_t padded) {
    store(sums, load<V>(sums) + a);
    store(sums + padded, load<V>(sums + padded) + b);
}

void row_moments(const Params& p, int64_t image, int64_t begin, int64_t end, const float* shift,
                 float* sums) {
    with_type(p.dtype, [&](auto type) {
        using S = decltype(type);
        const Rows<S> rows(p, image);
        clear(sums, rows.padded);
        for_blocks(begin, end, rows.together, rows.channels,
                   [&](int64_t row, int64_t last, int64_t c, auto part) {
                       const V centre = load<V>(shift + c);
                       V sum = {}, squares = {};
                       for (; row < last; ++row) {
                           const V d = load_as<V>(rows.x + row * rows.channels + c, part) - centre;
                           sum += d;
                           squares += d * d;
                       }
                       add(sums + c, sum, squares, rows.padded);
                   });
    });
}

void row_slopes(const Params& p, int64_t image, int64_t begin, int64_t end, const float* coefficients,
                float* sums) {
    with_type(p.dtype, [&](auto type) {
        using S = decltype(type);
        const Rows<S> rows(p, image);
        clear(sums, rows.padded);
        for_blocks(
            begin, end, rows.together, rows.channels, [&](int64_t row, int64_t last, int64_t c, auto part) {
                const Channel channel = rows.channel(coefficients, c);
                V normed = {}, plain = {};
                for (; row < last; ++row) {
                    const int64_t at = row * rows.channels + c;
                    const Slope s =
                        slope<S>(load_as<V>(rows.x + at, part), load_as<V>(rows.grad + at, part), channel);
                    normed += s.slope * s.normed;
                    plain += s.slope;
                }
                add(sums + c, normed, plain, rows.padded);
            });
    });
}

void row_forward(const Params& p, int64_t image, int64_t begin, int64_t end, const float* coefficients) {
    with_type(p.dtype, [&](auto type) {
        using S = decltype(type);
        const Rows<S> rows(p, image);
        for_blocks(
            begin, end, rows.together, rows.channels, [&](int64_t row, int64_t last, int64_t c, auto part) {
                const Channel channel = rows.channel(coefficients, c);
                for (; row < last; ++row) {
                    const int64_t at = row * rows.channels + c;
                    store_as(rows.out + at, norm_silu<S>(load_as<V>(rows.x + at, part), channel), part);
                }
            });
    });
}

void row_backward(const Params& p, int64_t image, int64_t begin, int64_t end, const float* coefficients) {
    with_type(p.dtype, [&](auto type) {
        using S = decltype(type);
        const Rows<S> rows(p, image);
        for_blocks(
            begin, end, rows.together, rows.channels, [&](int64_t row, int64_t last, int64_t c, auto part) {
                const Channel of = rows.channel(coefficients, c);
                const V mean = load<V>(coefficients + coef::slope_mean * rows.padded + c);
                const V normed_mean = load<V>(coefficients + coef::slope_normed_mean * rows.padded + c);
                for (; row < last; ++row) {
                    const int64_t at = row * rows.channels + c;
                    const Slope s =
                        slope<S>(load_as<V>(rows.x + at, part), load_as<V>(rows.grad + at, part), of);
                    store_as(rows.out + at, (s.slope * of.weight - mean - s.normed * normed_mean) * of.rstd,
                             part);
                }
            });
    });
}

}  // namespace
