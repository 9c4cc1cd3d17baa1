#include "cpu/linear.h"

#include <algorithm>

#include "common/buffer.h"
#include "common/cpu_features.h"
#include "common/pages.h"
#include "common/parallel.h"

namespace var_ext::cpu {

namespace {

// Packed at a time: elements of 32 bits along the summed axis, and rows. The rows fit the second cache beside
// a panel of columns. Longer blocks win over panels that fit the first cache, since there are fewer sums to
// keep for later.
constexpr int64_t block_elements = 1024;
constexpr int64_t most_rows = 96;

int64_t parts(int64_t whole, int64_t part) {
    return (whole + part - 1) / part;
}

void multiply(LinearProduct p) {
    if (p.rows * p.columns == 0) return;
    const LinearKernel& kernel = VAR_EXT_SELECT(linear);
    prefer_huge_pages(p.out, p.rows * p.columns * dtype_size(p.dtype));
    const int64_t depth = p.bf16 ? kernel.depth : 1, elements = parts(p.length, depth);
    p.blocks = std::max<int64_t>(1, parts(elements, block_elements));
    const int64_t block = parts(elements, p.blocks);
    p.block = block * depth;
    p.panels = parts(p.columns, kernel.tile_columns);
    p.right_panel = block * kernel.tile_columns + linear_spill;
    p.left_panel = block * kernel.tile_rows + linear_spill;

    // Sums of float32 wait in out for the next block: then only one is packed at a time, and stays in the
    // caches.
    const bool apart = p.blocks > 1 && p.dtype == DType::bfloat16;
    const int64_t at_once = apart ? p.blocks : 1;
    const Buffer<float> packed = allocate<float>(at_once * p.panels * p.right_panel);
    p.packed = packed.get();

    // Rows are dealt out evenly, and with few of them the columns too: each part packs the rows anew.
    const int64_t strips = parts(p.rows, kernel.tile_rows);
    const int threads = thread_count(strips * p.panels, kernel.tile_rows * p.right_panel * at_once / 4);
    const int64_t cuts = std::min(strips, parts(parts(p.rows, most_rows), threads) * threads);
    const int64_t column_cuts = std::min(p.panels, parts(threads, cuts));
    const int64_t scratch_rows = parts(strips, cuts) * kernel.tile_rows;
    const int64_t widest = parts(p.panels, column_cuts) * kernel.tile_columns;
    const int64_t scratch_size = parts(strips, cuts) * p.left_panel + (apart ? scratch_rows * widest : 0);
    const Buffer<float> scratch = allocate<float>(threads * scratch_size);

    constexpr int64_t together = 4;  // panels: columns of several are read in one go
    const int64_t groups = parts(p.panels, together);
    for (p.begin = 0; p.begin < p.blocks; p.begin = p.end) {
        p.end = p.begin + at_once;
        parallel_for(thread_count(at_once * groups, together * p.right_panel), at_once * groups,
                     [&](int64_t item, int) {
                         const int64_t first = item % groups * together;
                         kernel.pack(p, p.begin + item / groups, first, std::min(together, p.panels - first));
                     });
        parallel_for(threads, cuts * column_cuts, [&](int64_t item, int thread) {
            const int64_t cut = item % cuts, column_cut = item / cuts;
            const int64_t row = cut * strips / cuts * kernel.tile_rows;
            const int64_t end = std::min(p.rows, (cut + 1) * strips / cuts * kernel.tile_rows);
            const int64_t panel = column_cut * p.panels / column_cuts;
            kernel.multiply(p, row, end - row, panel, (column_cut + 1) * p.panels / column_cuts - panel,
                            scratch.get() + thread * scratch_size);
        });
    }
}

void sum_rows(const void* rows, DType dtype, int64_t count, int64_t columns, void* out, DType out_dtype) {
    const LinearKernel& kernel = VAR_EXT_SELECT(linear);
    // chunks depend on the shape alone, so the sums do not depend on the number of threads
    const int64_t chunk = std::max<int64_t>(16, parts(count, 64)), chunks = parts(count, chunk);
    const int64_t padded = parts(columns, 16) * 16;
    const Buffer<float> sums = allocate<float>(std::max<int64_t>(1, chunks * padded));
    parallel_for(thread_count(chunks, chunk * columns), chunks, [&](int64_t i, int) {
        kernel.sum_rows(rows, dtype, columns, i * chunk, std::min(count, (i + 1) * chunk),
                        sums.get() + i * padded);
    });
    kernel.add_up(sums.get(), chunks, padded, columns, out, out_dtype);
}

}  // namespace

void linear(const LinearParams& p) {
    LinearProduct product{};
    product.left = {p.x, p.dtype, p.inputs, 1};
    product.right = {p.weight, p.weight_dtype, p.inputs, 1};
    product.bias = p.bias;
    product.bias_dtype = p.bias_dtype;
    product.out = p.out;
    product.dtype = p.dtype;
    product.bf16 = product.rounds = p.bf16;
    product.rows = p.rows;
    product.columns = p.outputs;
    product.length = p.inputs;
    multiply(product);
}

void linear_backward(const LinearParams& p) {
    LinearProduct product{};
    product.bf16 = p.bf16;
    if (p.grad_x) {
        product.left = {p.grad, p.dtype, p.outputs, 1};
        product.right = {p.weight, p.weight_dtype, 1, p.inputs};
        product.out = p.grad_x;
        product.dtype = p.dtype;
        product.rows = p.rows;
        product.columns = p.inputs;
        product.length = p.outputs;
        multiply(product);
    }
    if (p.grad_weight) {
        product.left = {p.grad, p.dtype, 1, p.outputs};
        product.right = {p.x, p.dtype, 1, p.inputs};
        product.out = p.grad_weight;
        product.dtype = p.weight_dtype;
        product.rows = p.outputs;
        product.columns = p.inputs;
        product.length = p.rows;
        multiply(product);
    }
    if (p.grad_bias) sum_rows(p.grad, p.dtype, p.rows, p.outputs, p.grad_bias, p.bias_dtype);
}

}  // namespace var_ext::cpu
