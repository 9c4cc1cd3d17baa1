// nearest_code: for every row of x the index of its nearest codebook entry.
//
//   squared L2:  argmin_v |e_v|^2 - 2 x.e_v        cosine:  argmax_v  x/|x| . e_v/|e_v|
//
// fp32 throughout. Ties go to the lowest index. NaN behaves as in torch.argmin / argmax: the first code whose
// score is NaN is chosen, so a row that contains a NaN gets index 0.
#pragma once

#include <cstdint>
#include <optional>

#include "common/stream.h"
#include "common/tensor_view.h"

namespace var_ext {

struct NearestCodeParams {
    const float* x;         // (N, C)
    const float* codebook;  // (V, C), V >= 1
    int64_t* out;           // (N,)
    int64_t n, v, c;
    int64_t x_stride_n, x_stride_c;  // all strides in elements
    int64_t codebook_stride_v, codebook_stride_c;
    int64_t out_stride;
    bool cosine;
    float* scratch;  // CUDA alone: nearest_code_scratch floats; null on the CPU
    bool filter;     // CUDA alone: whether the scratch memory has room for the filter
};

// The memory that the CUDA kernels work in, offsets in floats. Vectors are rows of the channels, padded
// with zeros to a multiple of 8, and four more numbers: |e|^2 / 2 and sum |e|, or 0 and sum |x|.
struct NearestCodeLayout {
    static constexpr int64_t code_tile = 128, row_tile = 64, pack_rows = 64;
    static constexpr int64_t filter_row_tile = 128, filter_channels = 64, filter_codes = 1 << 26;  // at most
    bool filter;       // before the search
    int64_t channels;  // C filled up
    int64_t tiles;     // of codes; V is filled up with codes at an infinite distance
    int64_t splits;    // parts of the tiles that are searched in parallel
    // Only for the filter; empty without it.
    int64_t low;    // (tiles, groups, 128, 32) bf16: the codes, 32 channels a group, filled up with zeros
    int64_t minus;  // (128 tiles,) -|e|^2 / 2
    int64_t norms;  // (tiles * 2, 2) the largest |e|, and |e - its bf16|, of 64 codes each

    int64_t largest;  // (tiles * 2,) the largest sum |e| of 64 codes each
    int64_t found;    // (splits, N, 2) lowest score and its code
    int64_t rows;     // (N, channels + 4); the codes, (128 tiles, channels + 4), stand at 0
    int64_t size;     // of all

    // `packs_low`: whether there is room for the filter's codes.
    NearestCodeLayout(int64_t n, int64_t v, int64_t c, bool filters, bool packs_low);
};

// Whether a filter on the tensor cores makes the search on CUDA faster.
bool nearest_code_filter(int64_t n, int64_t v, int64_t c);

// Floats of scratch memory for N vectors against V codes of C channels. Its size tells the kernels whether to
// filter; nothing given, nearest_code_filter decides.
int64_t nearest_code_scratch(int64_t n, int64_t v, int64_t c, std::optional<bool> filter);

// Checks the contract; throws std::invalid_argument. `scratch` may be null.
NearestCodeParams nearest_code_params(const TensorView& x, const TensorView& codebook, const TensorView& out,
                                      bool cosine, const TensorView* scratch);

namespace cpu {
void nearest_code(const NearestCodeParams& p);
}
namespace cuda {
void nearest_code(const NearestCodeParams& p, const CudaStream& stream);
}

}  // namespace var_ext
