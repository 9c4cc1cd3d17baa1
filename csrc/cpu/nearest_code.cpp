#include "ops/nearest_code.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/buffer.h"
#include "common/cpu_features.h"
#include "common/parallel.h"
#include "cpu/nearest_code.h"

namespace var_ext::cpu {

namespace {

// The filter costs a second copy of the codebook: some rows and panels must make up for it.
bool use_filter(const NearestCodeParams& p, int64_t rows, const NearestCodeKernel& kernel) {
    return kernel.search_filtered != nullptr && rows >= 4 * kernel.row_block &&
           p.v >= 8 * kernel.code_block && p.c >= 8 && p.c <= 4096;
}

// Row i of x into column r of (C, R), at unit length for cosine. Returns sum |x|.
float pack_row(const NearestCodeParams& p, int64_t i, float* column, int64_t block) {
    const float* x = p.x + i * p.x_stride_n;
    float length = 1;
    if (p.cosine) {
        float square = 0;
        for (int64_t k = 0; k < p.c; ++k) square += x[k * p.x_stride_c] * x[k * p.x_stride_c];
        length = std::max(std::sqrt(square), 1e-12f);  // the floor that torch's normalize has
    }
    float size = 0;
    for (int64_t k = 0; k < p.c; ++k) {
        column[k * block] = x[k * p.x_stride_c] / length;
        size += std::fabs(column[k * block]);
    }
    return size;
}

// The definition, for rows or codebooks with NaN, infinities or products near the end of the fp32 range.
int64_t search_unusual(const NearestCodeParams& p, const PackedCodebook& packed, int64_t width,
                       const float* column, int64_t block) {
    int64_t best = 0;
    float lowest = INFINITY;
    for (int64_t v = 0; v < p.v; ++v) {
        const float* code = packed.panels.get() + v / width * p.c * width + v % width;
        float dot = 0;
        for (int64_t k = 0; k < p.c; ++k) dot += column[k * block] * code[k * width];
        const float score = packed.bias.get()[v] - dot;
        if (std::isnan(score)) return v;
        if (score < lowest) {
            lowest = score;
            best = v;
        }
    }
    return best;
}

}  // namespace

PackedCodebook pack_codebook(const NearestCodeParams& p, int64_t rows) {
    const NearestCodeKernel& kernel = VAR_EXT_SELECT(nearest_code);
    const int64_t width = kernel.code_block;
    PackedCodebook packed;
    packed.kernel = &kernel;
    packed.panel_count = (p.v + width - 1) / width;
    packed.panels = allocate<float>(packed.panel_count * p.c * width);
    packed.bias = allocate<float>(packed.panel_count * width);
    const int64_t low_size = (p.c + 1) / 2 * width;  // of a panel
    const bool filtered = use_filter(p, rows, kernel);
    if (filtered) packed.low = allocate<uint32_t>(packed.panel_count * low_size);
    std::vector<float> sizes(packed.panel_count), norms(2 * packed.panel_count);
    parallel_for(thread_count(packed.panel_count, width * p.c), packed.panel_count, [&](int64_t i, int) {
        sizes[i] = kernel.pack(p, i * width, std::min(width, p.v - i * width),
                               packed.panels.get() + i * p.c * width, packed.bias.get() + i * width);
        if (filtered) {
            kernel.pack_filter(packed.panels.get() + i * p.c * width, p.c, packed.low.get() + i * low_size,
                               &norms[2 * i]);
        }
    });
    for (float size : sizes) {
        if (size > packed.size || std::isnan(size)) packed.size = size;
    }
    for (int64_t i = 0; filtered && i < 2 * packed.panel_count; ++i) {
        packed.filter.norms[i % 2] = std::max(packed.filter.norms[i % 2], norms[i]);
    }
    packed.filter.panels = packed.low.get();
    packed.filter.largest_bias = p.cosine ? 0 : packed.filter.norms[0] * packed.filter.norms[0];
    return packed;
}

void nearest_code(const NearestCodeParams& p, const PackedCodebook& packed) {
    if (p.n == 0) return;
    const NearestCodeKernel& kernel = *packed.kernel;
    const int64_t block = kernel.row_block, width = kernel.code_block;
    const int64_t blocks = (p.n + block - 1) / block;
    const int threads = thread_count(blocks, block * packed.panel_count * p.c);
    const Buffer<float> scratch = allocate<float>(threads * block * p.c);
    std::vector<int32_t> found(threads * block);
    std::vector<float> sizes(threads * block);
    const bool filtered = packed.low != nullptr;
    const int64_t filter_size = packed.panel_count * block * width / 2 + (p.c + 1) / 2 * block;
    const Buffer<float> filter_scratch = allocate<float>(filtered ? threads * filter_size : 0);
    std::vector<int> trust(threads);  // below 0: so many blocks to go without the filter

    parallel_for(threads, blocks, [&](int64_t task, int thread) {
        float* rows = scratch.get() + thread * block * p.c;  // (C, R)
        int32_t* best = found.data() + thread * block;
        float* size = sizes.data() + thread * block;
        for (int64_t r = 0; r < block; ++r) {  // the last block repeats the last row
            size[r] = pack_row(p, std::min(task * block + r, p.n - 1), rows + r, block);
        }
        const bool found_by_filter =
            filtered && ++trust[thread] > 0 &&
            kernel.search_filtered(rows, packed.panels.get(), packed.bias.get(), packed.filter,
                                   packed.panel_count, p.c, filter_scratch.get() + thread * filter_size,
                                   best);
        if (!found_by_filter) {
            if (trust[thread] > 0) trust[thread] = -8;
            kernel.search(rows, packed.panels.get(), packed.bias.get(), packed.panel_count, p.c, best);
        }
        for (int64_t r = 0; r < block && task * block + r < p.n; ++r) {
            // |x.e| and |e|^2 are below this product: no score of an ordinary row overflows or is NaN.
            const bool ordinary = (size[r] + packed.size) * packed.size < 1e38f;
            p.out[(task * block + r) * p.out_stride] =
                ordinary ? best[r] : search_unusual(p, packed, width, rows + r, block);
        }
    });
}

void nearest_code(const NearestCodeParams& p) {
    if (p.n > 0) nearest_code(p, pack_codebook(p, p.n));
}

}  // namespace var_ext::cpu
