// The body of resample, compiled once for each variant. Lanes are planes (b, c): the same code serves
// contiguous and channels-last tensors, and only packing and unpacking know strides and dtypes.
#include <type_traits>

#include "cpu/planes.h"
#include "cpu/resample.h"

namespace {

using var_ext::cpu::AxisView;
using var_ext::cpu::Pass;
using var_ext::cpu::ResampleStrip;

// R rows of pixels `in_step` apart -> (out_w, L).
template <int L, int R, class T>
void resample_rows(const T* in, int64_t in_row, int64_t in_step, T* out, int64_t out_w, AxisView<T> x) {
    using V = Vec<T, L>;
    for (int64_t i = 0; i < out_w; ++i) {
        V sum[R] = {};
        for (int64_t k = x.first[i]; k < x.first[i + 1]; ++k) {
            const T* at = in + x.index[k] * in_step;
            for (int r = 0; r < R; ++r) sum[r] += x.weight[k] * load<V>(at + r * in_row);
        }
        for (int r = 0; r < R; ++r) store(out + (r * out_w + i) * L, sum[r]);
    }
}

// N pixels of output row `row`, from pixel i on, out of rows (width, L) that begin with input row `begin`.
template <int L, int N, class T>
void blend_pixels(const T* in, int64_t begin, int64_t width, AxisView<T> y, int64_t row, int64_t i, T* out,
                  int64_t step) {
    using V = Vec<T, L>;
    V sum[N] = {};
    for (int64_t k = y.first[row]; k < y.first[row + 1]; ++k) {
        const T* at = in + ((y.index[k] - begin) * width + i) * L;
        for (int j = 0; j < N; ++j) sum[j] += y.weight[k] * load<V>(at + j * L);
    }
    for (int j = 0; j < N; ++j) store(out + (i + j) * step, sum[j]);
}

// Output row `row` as the means of windows; `in` is input row `begin`.
template <int L, class T>
void mean_pixels(const T* in, int64_t begin, int64_t in_row, int64_t in_step, const ResampleStrip<T>& strip,
                 int64_t row, T* out, int64_t step) {
    using V = Vec<T, L>;
    const AxisView<T>&x = strip.x, &y = strip.y;
    const T rows = static_cast<T>(y.first[row + 1] - y.first[row]);
    for (int64_t i = 0; i < strip.p.out_w; ++i) {
        V sum = {};
        for (int64_t k = y.first[row]; k < y.first[row + 1]; ++k) {
            const T* line = in + (y.index[k] - begin) * in_row;
            for (int64_t j = x.first[i]; j < x.first[i + 1]; ++j) sum += load<V>(line + x.index[j] * in_step);
        }
        store(out + i * step, sum / rows / static_cast<T>(x.first[i + 1] - x.first[i]));
    }
}

template <int L, class S, class T>
void resample_strip(const ResampleStrip<T>& strip) {
    const auto& p = strip.p;
    const int64_t in_rows = strip.in_end - strip.in_begin, out_rows = strip.row_end - strip.row_begin;
    const Lanes<L> from(p.in_strides, p.channels, strip.plane_begin, strip.plane_count);
    const Lanes<L> to(p.out_strides, p.channels, strip.plane_begin, strip.plane_count);
    const S* in = static_cast<const S*>(p.in) + strip.in_begin * p.in_strides[2];
    S* out = static_cast<S*>(p.out) + strip.row_begin * p.out_strides[2];

    // Channels-last tensors of the type T itself are read and written in place.
    const T* source = strip.packed;
    int64_t source_row = p.in_w * L, source_step = L;
    T* target = strip.done;
    int64_t target_row = p.out_w * L, target_step = L;
    bool read_in_place = false, write_in_place = false;
    if constexpr (std::is_same<S, T>::value) {
        if ((read_in_place = from.adjacent)) {
            source = in + from.offset[0];
            source_row = p.in_strides[2];
            source_step = p.in_strides[3];
        }
        if ((write_in_place = to.adjacent)) {
            target = out + to.offset[0];
            target_row = p.out_strides[2];
            target_step = p.out_strides[3];
        }
    }

    if (!read_in_place) {
        for_segments(in_rows, p.in_w, p.in_strides, [&](int64_t r, int64_t pixels) {
            pack<L>(in + r * p.in_strides[2], from, pixels, p.in_strides[3], strip.packed + r * p.in_w * L);
        });
    }
    const int64_t row = p.out_w * L;
    int64_t r = strip.pass == Pass::mean ? in_rows : 0;  // means need no pass along x
    for (; r + 4 <= in_rows; r += 4) {
        resample_rows<L, 4>(source + r * source_row, source_row, source_step, strip.wide + r * row, p.out_w,
                            strip.x);
    }
    for (; r < in_rows; ++r) {
        resample_rows<L, 1>(source + r * source_row, source_row, source_step, strip.wide + r * row, p.out_w,
                            strip.x);
    }
    for (int64_t i = 0; i < out_rows; ++i) {
        const int64_t y = strip.row_begin + i;
        T* line = target + i * target_row;
        if (strip.pass == Pass::mean) {
            mean_pixels<L>(source, strip.in_begin, source_row, source_step, strip, y, line, target_step);
            continue;
        }
        int64_t j = 0;
        for (; j + 4 <= p.out_w; j += 4) {
            blend_pixels<L, 4>(strip.wide, strip.in_begin, p.out_w, strip.y, y, j, line, target_step);
        }
        for (; j < p.out_w; ++j) {
            blend_pixels<L, 1>(strip.wide, strip.in_begin, p.out_w, strip.y, y, j, line, target_step);
        }
    }
    if (!write_in_place) {
        for_segments(out_rows, p.out_w, p.out_strides, [&](int64_t i, int64_t pixels) {
            unpack<L>(strip.done + i * row, to, strip.plane_count, pixels, p.out_strides[3],
                      out + i * p.out_strides[2]);
        });
    }
}

void resample_f32(const ResampleStrip<float>& strip) {
    constexpr int lanes = lanes_of<float>;
    switch (strip.p.dtype) {
        case var_ext::DType::bfloat16:
            return resample_strip<lanes, BFloat16>(strip);
        case var_ext::DType::float16:
            return resample_strip<lanes, Float16>(strip);
        default:
            return resample_strip<lanes, float>(strip);
    }
}

void resample_f64(const ResampleStrip<double>& strip) {
    resample_strip<lanes_of<double>, double>(strip);
}

}  // namespace

namespace var_ext::cpu {

VAR_EXT_DEFINE_VARIANT(ResampleKernel, resample) = {lanes_of<float>, lanes_of<double>, resample_f32,
                                                    resample_f64};

}  // namespace var_ext::cpu
