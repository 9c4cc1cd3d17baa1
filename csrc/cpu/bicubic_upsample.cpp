#include "ops/bicubic_upsample.h"

#include <algorithm>
#include <cmath>

#include "cpu/resample.h"

namespace var_ext::cpu {

namespace {

// Keys' cubic convolution kernel at distance |d| <= 1 and 1 <= |d| <= 2.
template <class T>
T cubic_near(T d) {
    constexpr T a = T(-0.75);
    return ((a + 2) * d - (a + 3)) * d * d + 1;
}
template <class T>
T cubic_far(T d) {
    constexpr T a = T(-0.75);
    return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a;
}

// Positions and weights are computed in T, and taps are summed from the second on. On chips with FMA, when
// enlarging, that is torch's rounding for fp32 and fp64, bit for bit: later scales of a sampling with
// `more_smooth` magnify a last-bit difference a thousandfold. Elsewhere the last bits differ.
template <class T>
AxisTable<T> cubic_axis(int64_t n_in, int64_t n_out) {
    AxisTable<T> table;
    table.first.reserve(n_out + 1);
    table.index.reserve(4 * n_out);
    table.weight.reserve(4 * n_out);
    const T step = static_cast<T>(n_in) / static_cast<T>(n_out);
    for (int64_t i = 0; i < n_out; ++i) {
        const T position = step * (static_cast<T>(i) + T(0.5)) - T(0.5);
        const T base = std::floor(position);
        const T t = position - base;
        const T taps[4] = {cubic_far(t + 1), cubic_near(t), cubic_near(1 - t), cubic_far(2 - t)};
        const int64_t left = static_cast<int64_t>(base) - 1;
        for (int64_t k : {1, 0, 2, 3}) {  // a tap beyond the border reads the border pixel
            table.add(std::clamp<int64_t>(left + k, 0, n_in - 1), taps[k]);
        }
        table.end_row();
    }
    return table;
}

}  // namespace

AxisTable<float> bicubic_axis(int64_t n_in, int64_t n_out) {
    return cubic_axis<float>(n_in, n_out);
}

void bicubic_upsample(const ResampleParams& p) {
    resample(p, cubic_axis<float>, cubic_axis<double>, Pass::weighted);
}

void bicubic_upsample_backward(const ResampleParams& p) {
    resample(p, cubic_axis<float>, cubic_axis<double>, Pass::transposed);
}

}  // namespace var_ext::cpu
