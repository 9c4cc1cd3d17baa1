#include "cpu/resample.h"

#include <algorithm>
#include <utility>

#include "common/buffer.h"
#include "common/cpu_features.h"
#include "common/parallel.h"

namespace var_ext::cpu {

template <class T>
AxisTable<T> AxisTable<T>::transposed(int64_t n_in) const {
    std::vector<std::vector<std::pair<int64_t, T>>> taps(n_in);
    for (int64_t i = 0; i < size(); ++i) {
        for (int64_t k = first[i]; k < first[i + 1]; ++k) taps[index[k]].emplace_back(i, weight[k]);
    }
    AxisTable<T> result;
    for (const auto& row : taps) {
        for (const auto& [i, w] : row) result.add(i, w);
        result.end_row();
    }
    return result;
}

template <class T>
AxisView<T> view(const AxisTable<T>& table) {
    return {table.first.data(), table.index.data(), table.weight.data()};
}
template AxisView<float> view(const AxisTable<float>&);

namespace {

template <class T>
void rows_needed(const AxisTable<T>& y, ResampleStrip<T>& strip) {
    const auto begin = y.index.begin() + y.first[strip.row_begin],
               end = y.index.begin() + y.first[strip.row_end];
    const auto [low, high] = std::minmax_element(begin, end);
    strip.in_begin = begin == end ? 0 : *low;  // an input that no output reads has a gradient of zero
    strip.in_end = begin == end ? 0 : *high + 1;
}

template <class T>
void run(const ResampleParams& p, MakeAxis<T> make, Pass pass, int64_t lanes,
         void (*kernel)(const ResampleStrip<T>&)) {
    const bool backward = pass == Pass::transposed;
    const AxisTable<T> y = backward ? make(p.out_h, p.in_h).transposed(p.out_h) : make(p.in_h, p.out_h);
    const AxisTable<T> x = backward ? make(p.out_w, p.in_w).transposed(p.out_w) : make(p.in_w, p.out_w);

    // Strips of output rows small enough for the caches; they depend on the shape only.
    const int64_t budget = 256 * 1024 / static_cast<int64_t>(sizeof(T)) / lanes;  // pixels in scratch
    const int64_t row_cost = p.out_w + (p.in_w + p.out_w) * p.in_h / p.out_h + 1;
    const int64_t strip_rows = std::clamp<int64_t>(budget / row_cost, 1, p.out_h);
    const int64_t strip_count = (p.out_h + strip_rows - 1) / strip_rows;
    std::vector<ResampleStrip<T>> strips(strip_count);
    int64_t most_rows = 0;
    for (int64_t s = 0; s < strip_count; ++s) {
        strips[s].p = p;
        strips[s].pass = pass;
        strips[s].y = view(y);
        strips[s].x = view(x);
        strips[s].row_begin = s * strip_rows;
        strips[s].row_end = std::min(p.out_h, (s + 1) * strip_rows);
        rows_needed(y, strips[s]);
        most_rows = std::max(most_rows, strips[s].in_end - strips[s].in_begin);
    }

    const int64_t planes = p.batch * p.channels;
    const int64_t tasks = (planes + lanes - 1) / lanes * strip_count;
    const int64_t cost = strip_rows * (p.out_w * 8 + row_cost);
    const int threads = thread_count(tasks, cost);
    const int64_t packed = most_rows * p.in_w * lanes;
    const int64_t wide = most_rows * p.out_w * lanes;
    const int64_t done = strip_rows * p.out_w * lanes;
    const Buffer<T> scratch = allocate<T>(threads * (packed + wide + done));

    parallel_for(threads, tasks, [&](int64_t task, int thread) {
        ResampleStrip<T> strip = strips[task % strip_count];
        strip.plane_begin = task / strip_count * lanes;
        strip.plane_count = std::min(lanes, planes - strip.plane_begin);
        strip.packed = scratch.get() + thread * (packed + wide + done);
        strip.wide = strip.packed + packed;
        strip.done = strip.wide + wide;
        kernel(strip);
    });
}

// Both axes keep their size: every table here is the identity.
template <class S>
void copy(const ResampleParams& p) {
    const int64_t planes = p.batch * p.channels;
    parallel_for(thread_count(planes, p.out_h * p.out_w), planes, [&](int64_t plane, int) {
        const int64_t b = plane / p.channels, c = plane % p.channels;
        const S* in = static_cast<const S*>(p.in) + b * p.in_strides[0] + c * p.in_strides[1];
        S* out = static_cast<S*>(p.out) + b * p.out_strides[0] + c * p.out_strides[1];
        for (int64_t i = 0; i < p.out_h; ++i) {
            for (int64_t j = 0; j < p.out_w; ++j) {
                out[i * p.out_strides[2] + j * p.out_strides[3]] =
                    in[i * p.in_strides[2] + j * p.in_strides[3]];
            }
        }
    });
}

}  // namespace

void set_input_rows(const AxisTable<float>& y, ResampleStrip<float>& strip) {
    rows_needed(y, strip);
}

void resample(const ResampleParams& p, MakeAxis<float> make_f32, MakeAxis<double> make_f64, Pass pass) {
    if (p.batch * p.channels == 0) return;
    if (p.in_h == p.out_h && p.in_w == p.out_w) {
        switch (dtype_size(p.dtype)) {
            case 8:
                return copy<uint64_t>(p);
            case 4:
                return copy<uint32_t>(p);
            default:
                return copy<uint16_t>(p);
        }
    }
    const ResampleKernel& kernel = VAR_EXT_SELECT(resample);
    if (p.dtype == DType::float64) {
        run(p, make_f64, pass, kernel.lanes_f64, kernel.run_f64);
    } else {
        run(p, make_f32, pass, kernel.lanes_f32, kernel.run_f32);
    }
}

}  // namespace var_ext::cpu
