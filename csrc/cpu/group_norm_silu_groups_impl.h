// group_norm_silu for contiguous maps: a group is one run of memory, and one task takes it wholly.
#pragma once

#include "cpu/group_norm_silu_common_impl.h"

namespace {

struct Moments {
    float mean, rstd;
};

template <class S>
Moments moments_of(const S* x, int64_t n, double eps) {
    const int64_t samples = n < lanes ? 1 : smaller(n / lanes, sample), width = smaller(n, lanes);
    V total = {};
    for (int64_t i = 0; i < samples; ++i) {
        total += load_as<V>(x + i * (n / lanes / samples) * lanes, Part{width});
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
            V d = load_as<V>(x + i, Part{rest}) - shift;
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
    with_type(p.dtype, [&](auto type) {
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

void groups_backward(const Params& p, const float* weight, const float* bias, int64_t begin, int64_t end,
                     float* all_sums) {
    with_type(p.dtype, [&](auto type) {
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
                for_vectors(p.pixels, [&](int64_t i, auto part) {
                    const Slope s = slope<S>(load_as<V>(x + i, part), load_as<V>(grad + i, part), of);
                    store_as(out + i, (s.slope * of.weight - mean - s.normed * normed_mean) * of.rstd, part);
                });
            }
        }
    });
}

}  // namespace
