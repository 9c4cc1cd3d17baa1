// The body of group_norm_silu, compiled once for each variant.
//
// Variances come from sums of d = x - shift and d^2, where the shift is the mean of up to 16 rows of x
// itself. So (shift - mean)^2 is at most 1/16 of the summed squares: a large mean cannot cancel, and sums of
// parts simply add up.
#pragma once

#include "cpu/elementwise.h"
#include "cpu/group_norm_silu.h"
#include "cpu/math.h"

namespace {

using Params = var_ext::GroupNormSiluParams;
namespace coef = var_ext::cpu;

constexpr int64_t sample = 16;             // rows that make the shift
constexpr int64_t block = 64 * 4 * lanes;  // elements whose sums stay in float32

// One channel for all lanes, or a channel for each.
struct Channel {
    V mean, rstd, weight, bias;
};

struct Slope {
    V normed, slope;  // x before weight and bias, and the gradient of the norm's output
};

template <class S>
inline __attribute__((always_inline)) V exp_minus(V y) {
    return exp2<rough<S>>(y * -1.44269504f);
}

// `rstd` holds rstd * weight here.
template <class S>
inline __attribute__((always_inline)) V norm_silu(V x, const Channel& c) {
    const V y = (x - c.mean) * c.rstd + c.bias;
    return y / (1.0f + exp_minus<S>(y));
}

template <class S>
inline __attribute__((always_inline)) Slope slope(V x, V grad, const Channel& c) {
    const V normed = (x - c.mean) * c.rstd, any = normed * c.weight + c.bias;
    const V y = any < -80.0f ? V{} - 80.0f : any;  // there the derivative is 0, and e^-y could overflow
    const V e = exp_minus<S>(y), sigmoid = 1.0f / (1.0f + e);
    // sigmoid (1 + y (1 - sigmoid)), where 1 - sigmoid = e sigmoid does not cancel
    return {normed, grad * (sigmoid + y * sigmoid * (e * sigmoid))};
}

// ------------------------------------------------------------------ contiguous: a group is one run of memory

struct Moments {
    float mean, rstd;
};

template <class S>
Moments moments_of(const S* x, int64_t n, double eps) {
    const int64_t samples = n < lanes ? 1 : smaller(n / lanes, sample), width = smaller(n, lanes);
    V total = {};
    for (int64_t i = 0; i < samples; ++i) {
        total += load_some<V>(x + i * (n / lanes / samples) * lanes, width);
    }
    const float shift = reduce_add(total) / static_cast<float>(samples * width);

    double sum = 0, squares = 0;
    for (int64_t begin = 0; begin < n; begin += block) {
        const int64_t end = smaller(begin + block, n);
        V part_sum[4] = {}, part_squares[4] = {};
        int64_t i = begin;
        for (; i + 4 * lanes <= end; i += 4 * lanes) {
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
                const V d = load_as<V>(x + i + k * lanes) - shift;
                part_sum[k] += d;
                part_squares[k] += d * d;
            }
        }
        for (; i < end; i += lanes) {
            const int64_t rest = smaller(end - i, lanes);
            V d = load_some<V>(x + i, rest) - shift;
            for (int64_t l = rest; l < lanes; ++l) d[l] = 0;
            part_sum[0] += d;
            part_squares[0] += d * d;
        }
        sum += reduce_add((part_sum[0] + part_sum[1]) + (part_sum[2] + part_sum[3]));
        squares += reduce_add((part_squares[0] + part_squares[1]) + (part_squares[2] + part_squares[3]));
    }
    const double count = static_cast<double>(n), variance = (squares - sum * sum / count) / count;
    return {static_cast<float>(shift + sum / count),
            static_cast<float>(1 / __builtin_sqrt((variance < 0 ? 0 : variance) + eps))};
}

void groups_forward(const Params& p, const float* weight, const float* bias, int64_t begin, int64_t end) {
    by_dtype(p.dtype, [&](auto type) {
        using S = decltype(type);
        const int64_t per_group = p.channels / p.groups, n = per_group * p.pixels;
        for (int64_t group = begin; group < end; ++group) {
            const S* in = static_cast<const S*>(p.x) + group * n;
            const Moments m = moments_of(in, n, p.eps);
            const int64_t first = group % p.groups * per_group;
            // the last channel first: it is the one still in the cache
            for (int64_t c = per_group - 1; c >= 0; --c) {
                const Channel channel{V{} + m.mean, V{} + m.rstd * weight[first + c], V{},
                                      V{} + bias[first + c]};
                const S* x = in + c * p.pixels;
                S* out = static_cast<S*>(p.out) + group * n + c * p.pixels;
                for_vectors(p.pixels, [&](int64_t i, auto width) {
                    store_some(out + i, norm_silu<S>(load_some<V>(x + i, width), channel), width);
                });
            }
        }
    });
}

// Sums over one map, n elements: of slope * normed and of slope.
template <class S>
void map_slopes(const S* x, const S* grad, int64_t n, const Channel& channel, double (&sums)[2]) {
    sums[0] = sums[1] = 0;
    for (int64_t begin = 0; begin < n; begin += block) {
        V part[2] = {};
        for_vectors(smaller(block, n - begin), [&](int64_t i, auto width) {
            // lanes beyond the end have no gradient
            const Slope s =
                slope<S>(load_some<V>(x + begin + i, width), load_some<V>(grad + begin + i, width), channel);
            part[0] += s.slope * s.normed;
            part[1] += s.slope;
        });
        for (int k = 0; k < 2; ++k) sums[k] += reduce_add(part[k]);
    }
}

void groups_backward(const Params& p, const float* weight, const float* bias, int64_t begin, int64_t end,
                     float* all_sums) {
    by_dtype(p.dtype, [&](auto type) {
        using S = decltype(type);
        const int64_t per_group = p.channels / p.groups, n = per_group * p.pixels;
        const int64_t padded = coef::padded_channels(p.channels);
        for (int64_t group = begin; group < end; ++group) {
            const S *in = static_cast<const S*>(p.x) + group * n,
                    *grads = static_cast<const S*>(p.grad) + group * n;
            const Moments m = moments_of(in, n, p.eps);
            const int64_t first = group % p.groups * per_group;
            float* sums = all_sums + group / p.groups * 2 * padded + first;
            const auto channel = [&](int64_t c) {
                return Channel{V{} + m.mean, V{} + m.rstd, V{} + weight[first + c], V{} + bias[first + c]};
            };
            double slopes = 0, slopes_normed = 0;
            for (int64_t c = 0; c < per_group; ++c) {
                double of_map[2];
                map_slopes(in + c * p.pixels, grads + c * p.pixels, p.pixels, channel(c), of_map);
                sums[c] = static_cast<float>(of_map[0]);
                sums[padded + c] = static_cast<float>(of_map[1]);
                slopes_normed += weight[first + c] * of_map[0];
                slopes += weight[first + c] * of_map[1];
            }
            const float normed_mean = static_cast<float>(slopes_normed / static_cast<double>(n));
            const float mean = static_cast<float>(slopes / static_cast<double>(n));
            for (int64_t c = per_group - 1; c >= 0; --c) {
                const Channel of = channel(c);
                const S *x = in + c * p.pixels, *grad = grads + c * p.pixels;
                S* out = static_cast<S*>(p.out) + group * n + c * p.pixels;
                for_vectors(p.pixels, [&](int64_t i, auto width) {
                    const Slope s = slope<S>(load_some<V>(x + i, width), load_some<V>(grad + i, width), of);
                    store_some(out + i, (s.slope * of.weight - mean - s.normed * normed_mean) * of.rstd,
                               width);
                });
            }
        }
    });
}

// ------------------------------------------------------------------ channels-last: a channel for each lane

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

void row_shift(const Params& p, int64_t image, float* shift) {
    by_dtype(p.dtype, [&](auto type) {
        using S = decltype(type);
        const Rows<S> rows(p, image);
        const int64_t samples = smaller(sample, p.pixels), step = p.pixels / samples * p.channels;
        for_vectors(p.channels, [&](int64_t c, auto width) {
            V total = {};
            for (int64_t i = 0; i < samples; ++i) total += load_some<V>(rows.x + i * step + c, width);
            store(shift + c, total);
        });
    });
    const int64_t per_group = p.channels / p.groups;
    const float count = static_cast<float>(per_group * smaller(sample, p.pixels));
    for (int64_t begin = 0; begin < p.channels; begin += per_group) {
        float total = 0;
        for (int64_t c = begin; c < begin + per_group; ++c) total += shift[c];
        for (int64_t c = begin; c < begin + per_group; ++c) shift[c] = total / count;
    }
}

// Walks over rows [begin, end), so many together, and calls body(first row, last, channel, width).
template <class Body>
inline __attribute__((always_inline)) void for_blocks(int64_t begin, int64_t end, int64_t rows,
                                                      int64_t channels, const Body& body) {
    for (int64_t first = begin; first < end; first += rows) {
        const int64_t last = smaller(first + rows, end);
        for_vectors(channels, [&](int64_t c, auto width) { body(first, last, c, width); });
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
    by_dtype(p.dtype, [&](auto type) {
        using S = decltype(type);
        const Rows<S> rows(p, image);
        clear(sums, rows.padded);
        for_blocks(begin, end, rows.together, rows.channels,
                   [&](int64_t row, int64_t last, int64_t c, auto width) {
                       const V centre = load<V>(shift + c);
                       V sum = {}, squares = {};
                       for (; row < last; ++row) {
                           const V d = load_some<V>(rows.x + row * rows.channels + c, width) - centre;
                           sum += d;
                           squares += d * d;
                       }
                       add(sums + c, sum, squares, rows.padded);
                   });
    });
}

void row_slopes(const Params& p, int64_t image, int64_t begin, int64_t end, const float* coefficients,
                float* sums) {
    by_dtype(p.dtype, [&](auto type) {
        using S = decltype(type);
        const Rows<S> rows(p, image);
        clear(sums, rows.padded);
        for_blocks(begin, end, rows.together, rows.channels,
                   [&](int64_t row, int64_t last, int64_t c, auto width) {
                       const Channel channel = rows.channel(coefficients, c);
                       V normed = {}, plain = {};
                       for (; row < last; ++row) {
                           const int64_t at = row * rows.channels + c;
                           const Slope s = slope<S>(load_some<V>(rows.x + at, width),
                                                    load_some<V>(rows.grad + at, width), channel);
                           normed += s.slope * s.normed;
                           plain += s.slope;
                       }
                       add(sums + c, normed, plain, rows.padded);
                   });
    });
}

void row_forward(const Params& p, int64_t image, int64_t begin, int64_t end, const float* coefficients) {
    by_dtype(p.dtype, [&](auto type) {
        using S = decltype(type);
        const Rows<S> rows(p, image);
        for_blocks(
            begin, end, rows.together, rows.channels, [&](int64_t row, int64_t last, int64_t c, auto width) {
                const Channel channel = rows.channel(coefficients, c);
                for (; row < last; ++row) {
                    const int64_t at = row * rows.channels + c;
                    store_some(rows.out + at, norm_silu<S>(load_some<V>(rows.x + at, width), channel), width);
                }
            });
    });
}

void row_backward(const Params& p, int64_t image, int64_t begin, int64_t end, const float* coefficients) {
    by_dtype(p.dtype, [&](auto type) {
        using S = decltype(type);
        const Rows<S> rows(p, image);
        for_blocks(
            begin, end, rows.together, rows.channels, [&](int64_t row, int64_t last, int64_t c, auto width) {
                const Channel of = rows.channel(coefficients, c);
                const V mean = load<V>(coefficients + coef::slope_mean * rows.padded + c);
                const V normed_mean = load<V>(coefficients + coef::slope_normed_mean * rows.padded + c);
                for (; row < last; ++row) {
                    const int64_t at = row * rows.channels + c;
                    const Slope s =
                        slope<S>(load_some<V>(rows.x + at, width), load_some<V>(rows.grad + at, width), of);
                    store_some(rows.out + at, (s.slope * of.weight - mean - s.normed * normed_mean) * of.rstd,
                               width);
                }
            });
    });
}

// ------------------------------------------------------------------ parameters

void widen(DType dtype, const void* in, int64_t stride, int64_t n, float* out) {
    by_dtype(dtype, [&](auto type) {
        using S = decltype(type);
        const S* from = static_cast<const S*>(in);
        for (int64_t i = 0; stride != 1 && i < n; ++i) {
            store_some(out + i, load_some<V>(from + i * stride, 1), 1);
        }
        if (stride != 1) return;
        for_vectors(
            n, [&](int64_t i, auto width) { store_some(out + i, load_some<V>(from + i, width), width); });
    });
}

void narrow(DType dtype, const float* in, int64_t n, void* out) {
    by_dtype(dtype, [&](auto type) {
        using S = decltype(type);
        S* to = static_cast<S*>(out);
        for_vectors(n,
                    [&](int64_t i, auto width) { store_some(to + i, load_some<V>(in + i, width), width); });
    });
}

}  // namespace

#define VAR_EXT_GROUP_NORM_SILU_KERNEL                                     \
    {widen,       narrow,      groups_forward, groups_backward, row_shift, \
     row_moments, row_forward, row_slopes,     row_backward}
