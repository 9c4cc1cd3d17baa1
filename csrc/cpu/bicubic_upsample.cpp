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

// Positions and weights are computed in T: torch's rounding for that type.
template <class T>
AxisTable<T> bicubic_axis(int64_t n_in, int64_t n_out) {
    AxisTable<T> table;
    table.first.push_back(0);
    const T step = static_cast<T>(n_in) / static_cast<T>(n_out);
    for (int64_t i = 0; i < n_out; ++i) {
        const T position = step * (static_cast<T>(i) + T(0.5)) - T(0.5);
        const T base = std::floor(position);
        const T t = position - base;
        const T taps[4] = {cubic_far(t + 1), cubic_near(t), cubic_near(1 - t), cubic_far(2 - t)};
        const int64_t left = static_cast<int64_t>(base) - 1;
        const int64_t begin = std::clamp<int64_t>(left, 0, n_in - 1);
        const int64_t end = std::clamp<int64_t>(left + 3, 0, n_in - 1) + 1;
        const int64_t first = table.first.back();
        table.start.push_back(begin);
        table.weight.resize(first + end - begin);
        for (int64_t k = 0; k < 4; ++k) {  // a tap beyond the border falls on the border pixel
            table.weight[first + std::clamp<int64_t>(left + k, 0, n_in - 1) - begin] += taps[k];
        }
        table.first.push_back(static_cast<int64_t>(table.weight.size()));
    }
    return table;
}

}  // namespace

void bicubic_upsample(const ResampleParams& p) {
    resample(p, bicubic_axis<float>, bicubic_axis<double>, false);
}

void bicubic_upsample_backward(const ResampleParams& p) {
    resample(p, bicubic_axis<float>, bicubic_axis<double>, true);
}

}  // namespace var_ext::cpu
