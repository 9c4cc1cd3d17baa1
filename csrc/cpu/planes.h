// Between tensors of any strides and dtype, and vectors that hold one pixel of several planes (b, c); for the
// variant files, as vec.h.
#pragma once

#include "cpu/vec.h"

namespace {

// Where the lanes of a block begin in a tensor; a lane beyond the last plane repeats the first one.
template <int L>
struct Lanes {
    int64_t offset[L];
    bool adjacent = true;  // lane l stands l elements after lane 0: channels-last

    Lanes(const int64_t* strides, int64_t channels, int64_t begin, int64_t count) {
        for (int l = 0; l < L; ++l) {
            const int64_t plane = begin + (l < count ? l : 0);
            offset[l] = plane / channels * strides[0] + plane % channels * strides[1];
            if (offset[l] != offset[0] + l) adjacent = false;
        }
    }
};

// n pixels, `step` elements apart, into vectors of L planes each, `out_step` elements apart.
template <int L, class S, class T>
void pack(const S* in, const Lanes<L>& lanes, int64_t n, int64_t step, T* out, int64_t out_step = L) {
    using V = Vec<T, L>;
    int64_t i = 0;
    if (lanes.adjacent) {
        for (; i < n; ++i) store(out + i * out_step, load_as<V>(in + lanes.offset[0] + i * step));
        return;
    }
    for (; step == 1 && i + L <= n; i += L) {
        V tile[L];
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) tile[l] = load_as<V>(in + lanes.offset[l] + i);
        transpose<L / 2, L>(tile);
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) store(out + (i + l) * out_step, tile[l]);
    }
    for (; i < n; ++i) {
        S pixel[L];
        for (int l = 0; l < L; ++l) pixel[l] = in[lanes.offset[l] + i * step];
        store(out + i * out_step, load_as<V>(pixel));
    }
}

// The way back: vectors `in_step` elements apart into n pixels of `count` planes.
template <int L, class S, class T>
void unpack(const T* in, const Lanes<L>& lanes, int64_t count, int64_t n, int64_t step, S* out,
            int64_t in_step = L) {
    using V = Vec<T, L>;
    int64_t i = 0;
    if (lanes.adjacent) {
        for (; i < n; ++i) store_as(out + lanes.offset[0] + i * step, load<V>(in + i * in_step));
        return;
    }
    for (; step == 1 && i + L <= n; i += L) {
        V tile[L];
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) tile[l] = load<V>(in + (i + l) * in_step);
        transpose<L / 2, L>(tile);
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) {
            if (l < count) store_as(out + lanes.offset[l] + i, tile[l]);
        }
    }
    for (; i < n; ++i) {
        S pixel[L];
        store_as(pixel, load<V>(in + i * in_step));
        for (int l = 0; l < count; ++l) out[lanes.offset[l] + i * step] = pixel[l];
    }
}

// Calls body(first row, pixels): once for all rows where they follow each other in memory, else row by row.
template <class Body>
void for_segments(int64_t rows, int64_t width, const int64_t* strides, const Body& body) {
    if (strides[2] == width * strides[3]) {
        body(int64_t(0), rows * width);
    } else {
        for (int64_t r = 0; r < rows; ++r) body(r, width);
    }
}

}  // namespace
