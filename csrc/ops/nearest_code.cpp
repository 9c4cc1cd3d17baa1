#include "ops/nearest_code.h"

#include <algorithm>
#include <limits>

namespace var_ext {

namespace {

bool can_filter(int64_t v, int64_t c) {
    return c <= NearestCodeLayout::filter_channels && v <= NearestCodeLayout::filter_codes;
}

}  // namespace

NearestCodeLayout::NearestCodeLayout(int64_t n, int64_t v, int64_t c, bool filters, bool packs_low) {
    // Three blocks for each of 132 multiprocessors, if there are enough tiles. With the filter a split has
    // four tiles: each split searches at least one panel of codes again for each vector. Results do not
    // depend on it.
    filter = filters;
    const int64_t rows_of_block = filter ? filter_row_tile : row_tile;
    const int64_t row_blocks = std::max<int64_t>((n + rows_of_block - 1) / rows_of_block, 1);
    channels = (c + 7) / 8 * 8;
    tiles = (v + code_tile - 1) / code_tile;
    splits = std::min(filter ? (tiles + 3) / 4 : tiles, std::max<int64_t>(396 / row_blocks, 1));
    low = tiles * code_tile * (channels + 4);
    minus = low + (packs_low ? tiles * code_tile * ((c + 31) / 32) * 16 : 0);
    norms = minus + (packs_low ? tiles * code_tile : 0);
    largest = norms + (packs_low ? tiles * (code_tile / pack_rows) * 2 : 0);
    found = largest + tiles * (code_tile / pack_rows);
    rows = (found + 2 * splits * n + 3) / 4 * 4;
    size = rows + n * (channels + 4);
}

// Counted for an H100, 4096 codes of 32 channels: for 1024 vectors the plain search takes 4.5 us, the filter
// 1 us plus, whatever their number, some 3 us for the panels that are searched again, one by one; 2048
// vectors take 9.0 us and 4 us. Up to 16 channels half or more of the filter's products would be zeros.
bool nearest_code_filter(int64_t n, int64_t v, int64_t c) {
    return can_filter(v, c) && c > 16 && v >= 512 && n >= 512 && n >= (int64_t{1} << 23) / v;
}

int64_t nearest_code_scratch(int64_t n, int64_t v, int64_t c, std::optional<bool> filter) {
    const bool filtered = filter.value_or(nearest_code_filter(n, v, c));
    if (filtered && !can_filter(v, c)) {
        contract_error("nearest_code", "a filter takes at most 2^26 codes of 64 channels, got " +
                                           std::to_string(v) + " of " + std::to_string(c));
    }
    return NearestCodeLayout(n, v, c, filtered, filtered).size;
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
    p.filter = false;
    if (scratch != nullptr) {
        check_dtype(op, "scratch", *scratch, {DType::float32});
        const auto has_room = [&](bool filter) {
            return scratch->shape ==
                   std::vector<int64_t>{NearestCodeLayout(p.n, p.v, p.c, filter, filter).size};
        };
        p.filter = can_filter(p.v, p.c) && has_room(true);
        if (!p.filter && !has_room(false)) {
            check_shape(op, "scratch", *scratch, {{"S", nearest_code_scratch(p.n, p.v, p.c, {})}});
        }
        check_contiguous(op, "scratch", *scratch);
        p.scratch = static_cast<float*>(scratch->data);
    }
    return p;
}

}  // namespace var_ext
