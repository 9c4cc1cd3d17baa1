// Separable resampling: out = Wy in Wx^T for sparse Wy, Wx. The ops differ only in these two tables.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/variants.h"
#include "ops/resample.h"

namespace var_ext::cpu {

// A sparse (n_out, n_in) matrix. The taps of a row stand in the order in which they are summed.
template <class T>
struct AxisTable {
    std::vector<int64_t> first{0};  // (n_out + 1,) where the taps of each output begin
    std::vector<int64_t> index;     // of the input that a tap reads
    std::vector<T> weight;

    int64_t size() const { return static_cast<int64_t>(first.size()) - 1; }
    void add(int64_t input, T w) {
        index.push_back(input);
        weight.push_back(w);
    }
    void end_row() { first.push_back(static_cast<int64_t>(index.size())); }
    AxisTable transposed(int64_t n_in) const;
};

template <class T>
using MakeAxis = AxisTable<T> (*)(int64_t n_in, int64_t n_out);

enum class Pass {
    weighted,    // the tables that make(in, out) gives, along x and then along y
    transposed,  // its backward: the transposes of make(out, in)
    mean,        // the plain mean of each window of make(in, out), summed row by row as torch does
};
void resample(const ResampleParams& p, MakeAxis<float> make_f32, MakeAxis<double> make_f64, Pass pass);

AxisTable<float> bicubic_axis(int64_t n_in, int64_t n_out);  // the weights of bicubic_upsample along an axis

// What a variant of the kernel sees: plain pointers, one block of planes and one strip of output rows a call.
// No methods here: compiled with the flags of a variant, the linker could choose them for every other one.
template <class T>
struct AxisView {
    const int64_t* first;
    const int64_t* index;
    const T* weight;
};

template <class T>
AxisView<T> view(const AxisTable<T>& table);  // float and double

template <class T>
struct ResampleStrip {
    ResampleParams p;
    Pass pass;
    AxisView<T> y, x;
    int64_t plane_begin, plane_count;  // planes (b * C + c), at most `lanes` of them
    int64_t row_begin, row_end;        // output rows
    int64_t in_begin, in_end;          // input rows they need
    T* packed;                         // scratch: (in rows, in_w, lanes)
    T* wide;                           // scratch: (in rows, out_w, lanes)
    T* done;                           // scratch: (out rows, out_w, lanes)
};

// Sets in_begin and in_end to the input rows that output rows [row_begin, row_end) draw on.
void set_input_rows(const AxisTable<float>& y, ResampleStrip<float>& strip);

struct ResampleKernel {
    int64_t lanes_f32, lanes_f64;
    void (*run_f32)(const ResampleStrip<float>& strip);
    void (*run_f64)(const ResampleStrip<double>& strip);
};

VAR_EXT_DECLARE_VARIANTS(ResampleKernel, resample);

}  // namespace var_ext::cpu
