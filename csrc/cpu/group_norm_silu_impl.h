// The body of group_norm_silu, compiled once for each variant.
//
// Variances come from sums of d = x - shift and d^2, where the shift is the mean of up to 16 rows of x itself. So
// (shift - mean)^2 is at most 1/16 of the summed squares: a large mean cannot cancel, and sums of parts simply add up.
#pragma once

#include "cpu/group_norm_silu.h"
#include "cpu/math.h"

namespace {

using var_ext::DType;
using Params = var_ext::GroupNormSiluParams;
namespace coef = var_ext::cpu;

constexpr int lanes = lanes_of<float>;
using V = Vec<float, lanes>;
constexpr int64_t sample = 16;        // rows that make the shift
constexpr int64_t block = 64 * 4 * lanes;  // elements whose sums stay in float32

int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// One channel for all lanes, or a channel for each.
struct Channel {
    V mean, rstd, weight, bias;
};

struct Slope {
    V normed, slope;  // x before weight and bias, and the gradient of the norm's output
};

inline __attribute__((always_inline)) V minus_log2_e(V y) {
    return y * -1.44269504f;
}

// `rstd` holds rstd * weight here.
inline __attribute__((always_inline)) V norm_silu(V x, const Channel& c) {
    const V y = (x - c.mean) * c.rstd + c.bias;
    return y / (1.0f + exp2(minus_log2_e(y)));
}

inline __attribute__((always_inline)) Slope slope(V x, V grad, const Channel& c) {
    const V normed = (x - c.mean) * c.rstd, y = normed * c.weight + c.bias;
    const V sigmoid = 1.0f / (1.0f + exp2(minus_log2_e(y)));
    return {normed, grad * sigmoid * (1.0f + y * (1.0f - sigmoid))};
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
                const Channel channel{V{} + m.mean, V{} + m.rstd * weight[first + c], V{}, V{} + bias[first + c]};
                const S* x = in + c * p.pixels;
                S* out = static_cast<S*>(p.out) + group * n + c * p.pixels;
                int64_t i = 0;
                for (; i + lanes <= p.pixels; i += lanes) {
                    store_as(out + i, norm_silu(load_as<V>(x + i), channel));
                }
                if (i < p.pixels) {
                    const int64_t rest = p.pixels - i;
                    store_some(out + i, norm_silu(load_some<V>(x + i, rest), channel), rest);
                }
            }
        }
    });
}

// Sums over one map, n elements: of slope * normed and of slope.
template <class S>
void map_slopes(const S* x, const S* grad, int64_t n, const Channel& channel, double (&sums)[2]) {
    sums[0] = sums[1] = 0;
    for (int64_t begin = 0; begin < n; begin += block) {
        const int64_t end = smaller(begin + block, n);
        V part[2] = {};
        for (int64_t i = begin; i < end; i += lanes) {
            const int64_t width = smaller(end - i, lanes);
            // lanes beyond the end have no gradient
            const Slope s = slope(load_some<V>(x + i, width), load_some<V>(grad + i, width), channel);
            part[0] += s.slope * s.normed;
            part[1] += s.slope;
        }
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
            const S *in = static_cast<const S*>(p.x) + group * n, *grads = static_cast<const S*>(p.grad) + group * n;
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
                for (int64_t i = 0; i < p.pixels; i += lanes) {
                    const int64_t width = smaller(p.pixels - i, lanes);
                    const Slope s = slope(load_some<V>(x + i, width), load_some<V>(grad + i, width), of);
                    store_some(out + i, (s.slope * of.weight - mean - s.normed * normed_mean) * of.rstd, width);
                }
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

    Rows(const Params& p, int64_t image)
        : x(static_cast<const S*>(p.x)),
          grad(static_cast<const S*>(p.grad)),
          out(static_cast<S*>(p.out)),
          channels(p.channels),
          padded(coef::padded_channels(p.channels)) {
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
        for (int64_t c = 0; c < p.channels; c += lanes) {
            V total = {};
            for (int64_t i = 0; i < samples; ++i) {
                total += load_some<V>(rows.x + i * step + c, smaller(p.channels - c, lanes));
            }
            store(shift + c, total);
        }
    });
    const int64_t per_group = p.channels / p.groups;
    const float count = static_cast<float>(per_group * smaller(sample, p.pixels));
    for (int64_t begin = 0; begin < p.channels; begin += per_group) {
        float total = 0;
        for (int64_t c = begin; c < begin + per_group; ++c) total += shift[c];
        for (int64_t c = begin; c < begin + per_group; ++c) shift[c] = total / count;
    }
}

// Adds body(row, column, width, a, b)'s terms a and b of rows [begin, end) up for each channel: (2, padded).
template <class Body>
inline __attribute__((always_inline)) void sum_rows(int64_t begin, int64_t end, int64_t channels, float* sums,
                                                    const Body& body) {
    const int64_t padded = coef::padded_channels(channels);
    for (int64_t c = 0; c < 2 * padded; c += lanes) store(sums + c, V{});
    for (int64_t first = begin; first < end; first += sample) {
        const int64_t last = smaller(first + sample, end);
        for (int64_t c = 0; c < channels; c += lanes) {
            V a = {}, b = {};
            body(first, last, c, smaller(channels - c, lanes), a, b);
            store(sums + c, load<V>(sums + c) + a);
            store(sums + padded + c, load<V>(sums + padded + c) + b);
        }
    }
}

void row_moments(const Params& p, int64_t image, int64_t begin, int64_t end, const float* shift, float* sums) {
    by_dtype(p.dtype, [&](auto type) {
        const Rows<decltype(type)> rows(p, image);
        sum_rows(begin, end, p.channels, sums,
                 [&](int64_t row, int64_t last, int64_t c, int64_t width, V& sum, V& squares) {
                     const V centre = load<V>(shift + c);
                     for (; row < last; ++row) {
                         const V d = load_some<V>(rows.x + row * p.channels + c, width) - centre;
                         sum += d;
                         squares += d * d;
                     }
                 });
    });
}

void row_slopes(const Params& p, int64_t image, int64_t begin, int64_t end, const float* coefficients,
                float* sums) {
    by_dtype(p.dtype, [&](auto type) {
        const Rows<decltype(type)> rows(p, image);
        sum_rows(begin, end, p.channels, sums,
                 [&](int64_t row, int64_t last, int64_t c, int64_t width, V& normed, V& plain) {
                     const Channel channel = rows.channel(coefficients, c);
                     for (; row < last; ++row) {
                         const int64_t at = row * p.channels + c;
                         const Slope s = slope(load_some<V>(rows.x + at, width), load_some<V>(rows.grad + at, width),
                                               channel);
                         normed += s.slope * s.normed;
                         plain += s.slope;
                     }
                 });
    });
}

void row_forward(const Params& p, int64_t image, int64_t begin, int64_t end, const float* coefficients) {
    by_dtype(p.dtype, [&](auto type) {
        const Rows<decltype(type)> rows(p, image);
        for (int64_t row = begin; row < end; ++row) {
            for (int64_t c = 0; c < p.channels; c += lanes) {
                const int64_t at = row * p.channels + c, width = smaller(p.channels - c, lanes);
                store_some(rows.out + at,
                           norm_silu(load_some<V>(rows.x + at, width), rows.channel(coefficients, c)), width);
            }
        }
    });
}

void row_backward(const Params& p, int64_t image, int64_t begin, int64_t end, const float* coefficients) {
    by_dtype(p.dtype, [&](auto type) {
        const Rows<decltype(type)> rows(p, image);
        for (int64_t row = begin; row < end; ++row) {
            for (int64_t c = 0; c < p.channels; c += lanes) {
                const int64_t at = row * p.channels + c, width = smaller(p.channels - c, lanes);
                const Channel of = rows.channel(coefficients, c);
                const Slope s = slope(load_some<V>(rows.x + at, width), load_some<V>(rows.grad + at, width), of);
                const V mean = load<V>(coefficients + coef::slope_mean * rows.padded + c);
                const V normed_mean = load<V>(coefficients + coef::slope_normed_mean * rows.padded + c);
                store_some(rows.out + at, (s.slope * of.weight - mean - s.normed * normed_mean) * of.rstd, width);
            }
        }
    });
}

// ------------------------------------------------------------------ parameters

void widen(DType dtype, const void* in, int64_t stride, int64_t n, float* out) {
    by_dtype(dtype, [&](auto type) {
        using S = decltype(type);
        const S* from = static_cast<const S*>(in);
        for (int64_t i = 0; i < n; i += lanes) {
            const int64_t width = smaller(n - i, lanes);
            if (stride == 1) {
                store_some(out + i, load_some<V>(from + i, width), width);
                continue;
            }
            S part[lanes] = {};
            for (int64_t l = 0; l < width; ++l) part[l] = from[(i + l) * stride];
            store_some(out + i, load_as<V>(part), width);
        }
    });
}

void narrow(DType dtype, const float* in, int64_t n, void* out) {
    by_dtype(dtype, [&](auto type) {
        using S = decltype(type);
        for (int64_t i = 0; i < n; i += lanes) {
            const int64_t width = smaller(n - i, lanes);
            store_some(static_cast<S*>(out) + i, load_some<V>(in + i, width), width);
        }
    });
}

}  // namespace

#define VAR_EXT_GROUP_NORM_SILU_KERNEL                                                                    \
    {widen,       narrow,      groups_forward, groups_backward, row_shift, row_moments, row_forward, \
     row_slopes, row_backward}
