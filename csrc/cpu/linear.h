// What a variant of linear offers to the entry. Plain functions and pointers only, see resample.h.
#pragma once

#include <cstdint>

#include "cpu/variants.h"
#include "ops/linear.h"

namespace var_ext::cpu {

// A factor of a product: number (i, k), k along the summed axis, stands at i * apart + k * step. One of them
// is 1.
struct LinearFactor {
    const void* data;
    DType dtype;
    int64_t apart, step;
};

// out(m, n) = sum over k of left(m, k) right(n, k), plus bias(n).
//
// Both factors are packed in panels: as many rows of `left`, or columns, as a tile of sums has. The summed
// axis is cut into blocks, whose sums are added in order: no sum depends on how rows and panels are dealt
// out.
struct LinearProduct {
    LinearFactor left, right;
    const void* bias;  // (columns,) or null
    void* out;         // (rows, columns), dense
    DType bias_dtype, dtype;
    bool bf16, rounds;              // whether factors are of bfloat16; whether out is
    int64_t rows, columns, length;  // length: of the summed axis
    int64_t blocks, block;          // of the summed axis, and numbers in all but the last
    int64_t begin, end;             // the blocks that are packed and added up now
    float* packed;                  // `right`: (end - begin, panels), right_panel floats each
    int64_t panels, right_panel, left_panel;
};

struct LinearKernel {
    int64_t tile_rows, tile_columns;
    int64_t depth;  // numbers of bfloat16 in 32 bits of a panel: 2 where there are instructions for pairs
    void (*pack)(const LinearProduct& p, int64_t block, int64_t first_panel, int64_t panels);
    // A part of out. Scratch: the rows as panels of `left`, then fp32 (rows, panels * tile_columns) if there
    // are several blocks and out is bfloat16: then all are added up at once.
    void (*multiply)(const LinearProduct& p, int64_t first_row, int64_t rows, int64_t first_panel,
                     int64_t panels, float* scratch);
    // sums, (padded,): the sums over rows [begin, end) of (rows, columns).
    void (*sum_rows)(const void* rows, DType dtype, int64_t columns, int64_t begin, int64_t end, float* sums);
    // The sum of `count` such sums, `padded` floats apart.
    void (*add_up)(const float* sums, int64_t count, int64_t padded, int64_t columns, void* out, DType dtype);
};

constexpr int64_t linear_spill = 16;  // floats that packing may write past the end of a panel

VAR_EXT_DECLARE_VARIANTS(LinearKernel, linear);

}  // namespace var_ext::cpu
