// group_norm_silu for contiguous maps: a group is one run of memory, and one task takes it wholly.
#pragma once

#include "cpu/group_norm_silu_common.h"

namespace {

struct Moments {
    float mean, rstd;
};

// The mean of up to 16 vectors of a run.
template <class S>
float rough_mean(const S* x, int64_t n) {
    const int64_t samples = n < lanes ? 1 : smaller(n / lanes, sample), width = smaller(n, lanes);
    V total = {};
    for (int64_t i = 0; i < samples; ++i) {
        total += load_as<V>(x + i * (n / lanes / samples) * lanes, Part{width});
    }
    return reduce_add(total) / static_cast<float>(samples * width);
}

// Adds x - shift and its square over a run.
template <class S>
void add_moments(const S* x, int64_t n, float shift, double& sum, double& squares) {
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
            V d = load_as<V>(x + i, Part{rest}) - shift;
            for (int64_t l = rest; l < lanes; ++l) d[l] = 0;
            part_sum[0] += d;
            part_squares[0] += d * d;
        }
        sum += reduce_add((part_sum[0] + part_sum[1]) + (part_sum[2] + part_sum[3]));
        squares += reduce_add((part_squares[0] + part_squares[1]) + (part_squares[2] + part_squares[3]));
    }
}

// Of a group of `channels` maps of `pixels` each; `input_bias`: what is added to each map, or null.
template <class S>
Moments moments_of(const S* x, int64_t channels, int64_t pixels, const float* input_bias, double eps) {
    double sum = 0, squares = 0;
    float shift = 0;
    if (input_bias == nullptr) {
        shift = rough_mean(x, channels * pixels);
        add_moments(x, channels * pixels, shift, sum, squares);
    } else {
        for (int64_t c = 0; c < channels; ++c) shift += rough_mean(x + c * pixels, pixels) + input_bias[c];
        shift /= static_cast<float>(channels);
        for (int64_t c = 0; c < channels; ++c) {
            add_moments(x + c * pixels, pixels, shift - input_bias[c], sum, squares);
        }
    }
    const double count = static_cast<double>(channels * pixels);
    const double variance = (squares - sum * sum / count) / count;
    return {static_cast<float>(shift + sum / count),
            static_cast<float>(1 / __builtin_sqrt((variance < 0 ? 0 : variance) + eps))};
}

using Channels = var_ext::cpu::GroupNormSiluChannels;

inline float added(const Channels& of, int64_t c) {
    return of.input_bias ? of.input_bias[c] : 0.0f;
}
inline const float* added_from(const Channels& of, int64_t first) {
    return of.input_bias ? of.input_bias + first : nullptr;
}

void groups_forward(const Params& p, const Channels& of, int64_t begin, int64_t end) {
    with_type(p.dtype, [&](auto type) {
        using S = decltype(type);
        const int64_t per_group = p.channels / p.groups, n = per_group * p.pixels;
        for (int64_t group = begin; group < end; ++group) {
            const S* in = static_cast<const S*>(p.x) + group * n;
            const int64_t first = group % p.groups * per_group;
            const Moments m = moments_of(in, per_group, p.pixels, added_from(of, first), p.eps);
            // the last channel first: it is the one still in the cache
            for (int64_t c = per_group - 1; c >= 0; --c) {
                const Channel channel{V{} + (m.mean - added(of, first + c)),
                                      V{} + m.rstd * of.weight[first + c], V{}, V{} + of.bias[first + c]};
                const S* x = in + c * p.pixels;
                S* out = static_cast<S*>(p.out) + group * n + c * p.pixels;
                for_vectors(p.pixels, [&](int64_t i, auto part) {
                    store_as(out + i, norm_silu<S>(load_as<V>(x + i, part), channel), part);
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
        V total[2] = {};
        for_vectors(smaller(block, n - begin), [&](int64_t i, auto part) {
            // lanes beyond the end have no gradient
            const Slope s =
                slope<S>(load_as<V>(x + begin + i, part), load_as<V>(grad + begin + i, part), channel);
            total[0] += s.slope * s.normed;
            total[1] += s.slope;
        });
        for (int k = 0; k < 2; ++k) sums[k] += reduce_add(total[k]);
    }
}

void groups_backward(const Params& p, const Channels& of, int64_t begin, int64_t end, float* all_sums) {
    with_type(p.dtype, [&](auto type) {
        using S = decltype(type);
        const int64_t per_group = p.channels / p.groups, n = per_group * p.pixels;
        const int64_t padded = coef::padded_channels(p.channels);
        for (int64_t group = begin; group < end; ++group) {
            const S *in = static_cast<const S*>(p.x) + group * n,
                    *grads = static_cast<const S*>(p.grad) + group * n;
            const int64_t first = group % p.groups * per_group;
            const Moments m = moments_of(in, per_group, p.pixels, added_from(of, first), p.eps);
            float* sums = all_sums + group / p.groups * 2 * padded + first;
            const auto channel = [&](int64_t c) {
                return Channel{V{} + (m.mean - added(of, first + c)), V{} + m.rstd,
                               V{} + of.weight[first + c], V{} + of.bias[first + c]};
            };
            double slopes = 0, slopes_normed = 0;
            for (int64_t c = 0; c < per_group; ++c) {
                double of_map[2];
                map_slopes(in + c * p.pixels, grads + c * p.pixels, p.pixels, channel(c), of_map);
                sums[c] = static_cast<float>(of_map[0]);
                sums[padded + c] = static_cast<float>(of_map[1]);
                slopes_normed += of.weight[first + c] * of_map[0];
                slopes += of.weight[first + c] * of_map[1];
            }
            const float normed_mean = static_cast<float>(slopes_normed / static_cast<double>(n));
            const float mean = static_cast<float>(slopes / static_cast<double>(n));
            for (int64_t c = per_group - 1; c >= 0; --c) {
                const Channel at = channel(c);
                const S *x = in + c * p.pixels, *grad = grads + c * p.pixels;
                S* out = static_cast<S*>(p.out) + group * n + c * p.pixels;
                for_vectors(p.pixels, [&](int64_t i, auto part) {
                    const Slope s = slope<S>(load_as<V>(x + i, part), load_as<V>(grad + i, part), at);
                    store_as(out + i, (s.slope * at.weight - mean - s.normed * normed_mean) * at.rstd, part);
                });
            }
        }
    });
}

}  // namespace
