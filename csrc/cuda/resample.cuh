// The two interpolations along one axis, for any kernel: windows of area_downsample, taps of
// bicubic_upsample, and their transposes. `n_in` and `n_out` are sizes of the forward map, at most
// resample_max_side. Weights are rounded step by step as on the CPU, without fused multiply-adds:
// they are bitwise equal.
#pragma once

#include <cuda_runtime.h>

namespace var_ext::cuda {

constexpr int resample_max_side = 1 << 14;  // products of two sides stay within 32 bits

// The compiler fuses neither of these with another operation.
__device__ inline float times(float x, float y) {
    return __fmul_rn(x, y);
}
__device__ inline double times(double x, double y) {
    return __dmul_rn(x, y);
}
__device__ inline float plus(float x, float y) {
    return __fadd_rn(x, y);
}
__device__ inline double plus(double x, double y) {
    return __dadd_rn(x, y);
}
// sum + x * y, rounded once: the step of a sum of taps.
__device__ inline float add_product(float sum, float x, float y) {
    return __fmaf_rn(x, y, sum);
}
__device__ inline double add_product(double sum, double x, double y) {
    return __fma_rn(x, y, sum);
}

struct Range {
    int begin, end;
};

// The inputs whose mean is output i of area_downsample. The outputs that input j is part of are
// area_window(j, n_out, n_in), each with the weight 1 / (size of its window).
__device__ inline Range area_window(int i, int n_in, int n_out) {
    return {i * n_in / n_out, ((i + 1) * n_in + n_out - 1) / n_out};
}

// The terms of output i of bicubic_upsample: inputs, clamped to the border, and weights in the order of the
// sum, which is first, zeroth, second, third from the left.
template <class S>
struct CubicTaps {
    int index[4];
    S weight[4];
};

// Keys' kernel with a = -0.75 at distance 0 <= d <= 1 and 1 <= d <= 2.
template <class S>
__device__ S cubic_near(S d) {
    return plus(times(times(plus(times(S(1.25), d), S(-2.25)), d), d), S(1));
}
template <class S>
__device__ S cubic_far(S d) {
    return plus(times(plus(times(plus(times(S(-0.75), d), S(3.75)), d), S(-6)), d), S(3));
}

template <class S>
__device__ CubicTaps<S> cubic_taps(int i, int n_in, int n_out) {
    const S step = static_cast<S>(n_in) / static_cast<S>(n_out);
    const S position = plus(times(step, plus(static_cast<S>(i), S(0.5))), S(-0.5));
    const S base = floor(position), t = plus(position, -base);
    const int left = static_cast<int>(base), last = n_in - 1;
    CubicTaps<S> taps;
    taps.index[0] = min(max(left, 0), last);
    taps.index[1] = min(max(left - 1, 0), last);
    taps.index[2] = min(max(left + 1, 0), last);
    taps.index[3] = min(max(left + 2, 0), last);
    taps.weight[0] = cubic_near(t);
    taps.weight[1] = cubic_far(plus(t, S(1)));
    taps.weight[2] = cubic_near(plus(S(1), -t));
    taps.weight[3] = cubic_far(plus(S(2), -t));
    return taps;
}

// Outputs of which some tap may read input j: all that do, and at most two more at either end.
__device__ inline Range cubic_outputs(int j, int n_in, int n_out) {
    // with s = n_in / n_out, floor(s (i + 0.5) - 0.5) lies within [j - 2, j + 1]
    const int low = (2 * j - 3) * n_out - n_in, high = (2 * j + 5) * n_out - n_in;
    return {j == 0 ? 0 : max(low / (2 * n_in) - 1, 0),
            j == n_in - 1 ? n_out : min(max(high, 0) / (2 * n_in) + 2, n_out)};
}

}  // namespace var_ext::cuda
