// Separable resampling: out = Wy in Wx^T for sparse Wy, Wx. The ops differ only in these two tables.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/resample.h"

namespace var_ext::cpu {

// A sparse (n_out, n_in) matrix whose rows are runs of consecutive taps.
template <class T>
struct AxisTable {
    std::vector<int64_t> start;  // (n_out,) first input of each output
    std::vector<int64_t> first;  // (n_out + 1,) where its weights begin
    std::vector<T> weight;

    int64_t size() const { return static_cast<int64_t>(start.size()); }
    AxisTable transposed(int64_t n_in) const;
};

template <class T>
using MakeAxis = AxisTable<T> (*)(int64_t n_in, int64_t n_out);

// Runs p with the tables that make(in, out) gives; backward: with the transposes of make(out, in).
void resample(const ResampleParams& p, MakeAxis<float> make_f32, MakeAxis<double> make_f64, bool backward);

// What a variant of the kernel sees: plain pointers, one block of planes and one strip of output rows a call.
template <class T>
struct AxisView {
    const int64_t* start;
    const int64_t* first;
    const T* weight;
};

template <class T>
struct ResampleStrip {
    ResampleParams p;
    AxisView<T> y, x;
    int64_t plane_begin, plane_count;  // planes (b * C + c), at most `lanes` of them
    int64_t row_begin, row_end;        // output rows
    int64_t in_begin, in_end;          // input rows they need
    T* packed;                         // scratch: (in rows, in_w, lanes)
    T* wide;                           // scratch: (in rows, out_w, lanes)
    T* done;                           // scratch: (out rows, out_w, lanes)
};

struct ResampleKernel {
    int64_t lanes_f32, lanes_f64;
    void (*run_f32)(const ResampleStrip<float>& strip);
    void (*run_f64)(const ResampleStrip<double>& strip);
};

extern const ResampleKernel resample_portable, resample_avx2, resample_avx512;

}  // namespace var_ext::cpu
