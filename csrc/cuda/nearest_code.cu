#include "cuda/nearest_code.cuh"

#include <string>

#include "cuda/nearest_code_filter.cuh"
#include "cuda/nearest_code_pack.cuh"
#include "cuda/nearest_code_search.cuh"

namespace var_ext::cuda {

CodeSearch code_search(float* scratch, const NearestCodeLayout& layout, int64_t n, int64_t v, int64_t c,
                       int64_t* out) {
    CodeSearch search;
    search.codes = scratch;
    search.rows = scratch + layout.rows;
    search.largest = scratch + layout.largest;
    search.found = scratch + layout.found;
    search.n = search.image = n;
    search.v = v;
    search.image_stride = 0;
    search.stride = 1;
    search.channels = static_cast<int>(c);
    search.channels_packed = static_cast<int>(layout.channels);
    search.tiles = static_cast<int>(layout.tiles);
    search.splits = static_cast<int>(layout.splits);
    search.out = out;
    const bool packs_low = layout.minus > layout.low;
    search.filter = layout.filter;
    search.low = packs_low ? reinterpret_cast<const uint32_t*>(scratch + layout.low) : nullptr;
    search.minus = packs_low ? scratch + layout.minus : nullptr;
    search.norms = packs_low ? scratch + layout.norms : nullptr;
    return search;
}

void pack_codes(const char* op, const CudaStream& stream, const CodeSearch& search, const float* codebook,
                const int64_t* strides, bool cosine) {
    const PackedRows packed = {const_cast<float*>(search.codes),
                               const_cast<float*>(search.largest),
                               search.v,
                               search.channels,
                               search.channels_packed,
                               true,
                               cosine};
    const MatrixRows codes = {codebook, strides[0], strides[1]};
    const int64_t in_memory = int64_t{search.tiles} * search_codes_of_tile;
    if (search.low == nullptr) {
        pack_rows(op, stream, codes, packed, NoFilter{}, in_memory);
        return;
    }
    const FilterCodes filter = {const_cast<uint32_t*>(search.low), const_cast<float*>(search.minus),
                                const_cast<float*>(search.norms), filter_groups(search.channels)};
    pack_rows(op, stream, codes, packed, filter, in_memory);
}

void search_codes(const char* op, const CudaStream& stream, const CodeSearch& search) {
    if (search.filter) {
        filter_codes(op, stream, search);
    } else {
        const int64_t row_blocks = (search.n + search_rows - 1) / search_rows;
        launch(op, stream, dim3(static_cast<unsigned>(row_blocks * search.splits)), search_threads,
               search_shared(search.channels_packed) * sizeof(float), nearest_code_search_kernel, search);
    }
    const int64_t warps = search_threads / 32;
    launch(op, stream, dim3(static_cast<unsigned>((search.n + warps - 1) / warps)), search_threads, 0,
           nearest_code_finish_kernel, search);
}

void nearest_code(const NearestCodeParams& p, const CudaStream& stream) {
    const char* op = "nearest_code";
    if (p.n == 0) return;
    constexpr int64_t limit = int64_t{1} << 31;
    if (p.n >= limit || p.c >= limit) {
        contract_error(op, "N and C must be below 2^31 on CUDA, got " + std::to_string(p.n) + " and " +
                               std::to_string(p.c));
    }
    if (p.scratch == nullptr) {
        contract_error(op, "scratch must have shape (" +
                               std::to_string(nearest_code_scratch(p.n, p.v, p.c, {})) +
                               ",) on CUDA, got none");
    }
    const NearestCodeLayout layout(p.n, p.v, p.c, p.filter, p.filter);
    CodeSearch search = code_search(p.scratch, layout, p.n, p.v, p.c, p.out);
    search.stride = p.out_stride;
    const int64_t strides[2] = {p.codebook_stride_v, p.codebook_stride_c};
    pack_codes(op, stream, search, p.codebook, strides, p.cosine);
    const PackedRows packed = {const_cast<float*>(search.rows), nullptr, p.n,     search.channels,
                               search.channels_packed,          false,   p.cosine};
    pack_rows(op, stream, MatrixRows{p.x, p.x_stride_n, p.x_stride_c}, packed, NoFilter{}, p.n);
    search_codes(op, stream, search);
}

}  // namespace var_ext::cuda
