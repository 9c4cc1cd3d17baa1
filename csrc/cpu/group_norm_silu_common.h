// What the kernels of group_norm_silu for both memory formats share, compiled once for each variant.
#pragma once

#include "cpu/group_norm_silu.h"
#include "cpu/rows.h"

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

}  // namespace
