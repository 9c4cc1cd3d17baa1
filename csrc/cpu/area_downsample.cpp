#include "ops/area_downsample.h"

#include "cpu/resample.h"

namespace var_ext::cpu {

namespace {

template <class T>
AxisTable<T> area_axis(int64_t n_in, int64_t n_out) {
    AxisTable<T> table;
    table.first.reserve(n_out + 1);
    table.index.reserve(n_in + 2 * n_out);
    table.weight.reserve(n_in + 2 * n_out);
    for (int64_t i = 0; i < n_out; ++i) {
        const int64_t begin = i * n_in / n_out;
        const int64_t end = ((i + 1) * n_in + n_out - 1) / n_out;
        for (int64_t j = begin; j < end; ++j) table.add(j, T(1) / static_cast<T>(end - begin));
        table.end_row();
    }
    return table;
}

}  // namespace

void area_downsample(const ResampleParams& p) {
    resample(p, area_axis<float>, area_axis<double>, Pass::mean);
}

void area_downsample_backward(const ResampleParams& p) {
    resample(p, area_axis<float>, area_axis<double>, Pass::transposed);
}

}  // namespace var_ext::cpu
