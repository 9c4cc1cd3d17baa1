#include "ops/nearest_code.h"

#include <algorithm>
#include <limits>

namespace var_ext {

NearestCodeLayout::NearestCodeLayout(int64_t n, int64_t v, int64_t c) {
    // Blocks for three on each of 132 multiprocessors, if there are tiles enough. What is found does not
    // depend on it.
    const int64_t row_blocks = std::max<int64_t>((n + row_tile - 1) / row_tile, 1);
    channels = (c + 7) / 8 * 8;
    tiles = (v + code_tile - 1) / code_tile;
    splits = std::min(tiles, std::max<int64_t>(396 / row_blocks, 1));
    largest = tiles * code_tile * (channels + 4);
    found = largest + tiles * (code_tile / pack_rows);
    rows = (found + 2 * splits * n + 3) / 4 * 4;
    size = rows + n * (channels + 4);
}

int64_t nearest_code_scratch(int64_t n, int64_t v, int64_t c) {
    return NearestCodeLayout(n, v, c).size;
}

NearestCodeParams nearest_code_params(const TensorView& x, const TensorView& codebook, const TensorView& out,
                                      bool cosine, const TensorView* scratch) {
    const char* op = "nearest_code";
    check_dtype(op, "x", x, {DType::float32});
    check_dtype(op, "codebook", codebook, {DType::float32});
    check_dtype(op, "out", out, {DType::int64});
    check_shape(op, "x", x, {{"N", any_size}, {"C", any_size}});
    check_shape(op, "codebook", codebook, {{"V", any_size}, {"C", x.shape[1]}});
    check_shape(op, "out", out, {{"N", x.shape[0]}});
    check_output(op, "out", out);
    if (x.shape[1] < 1) contract_error(op, "x must have at least one channel, got shape " + x.shape_text());
    if (codebook.shape[0] < 1 || codebook.shape[0] > std::numeric_limits<int32_t>::max()) {
        contract_error(op, "codebook must have 1 to 2^31 - 1 entries, got shape " + codebook.shape_text());
    }
    NearestCodeParams p;
    p.x = static_cast<const float*>(x.data);
    p.codebook = static_cast<const float*>(codebook.data);
    p.out = static_cast<int64_t*>(out.data);
    p.n = x.shape[0];
    p.v = codebook.shape[0];
    p.c = x.shape[1];
    p.x_stride_n = x.strides[0];
    p.x_stride_c = x.strides[1];
    p.codebook_stride_v = codebook.strides[0];
    p.codebook_stride_c = codebook.strides[1];
    p.out_stride = out.strides[0];
    p.cosine = cosine;
    p.scratch = nullptr;
    if (scratch != nullptr) {
        check_dtype(op, "scratch", *scratch, {DType::float32});
        check_shape(op, "scratch", *scratch, {{"S", nearest_code_scratch(p.n, p.v, p.c)}});
        check_contiguous(op, "scratch", *scratch);
        p.scratch = static_cast<float*>(scratch->data);
    }
    return p;
}

}  // namespace var_ext
