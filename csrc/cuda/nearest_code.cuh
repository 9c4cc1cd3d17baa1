// The search for the nearest code in three steps: vectors are packed, blocks search tiles of the codebook,
// directly or after a filter on the tensor cores, and a last step takes the lowest over the tiles.
// residual_quantize packs its own vectors.
//
// Scores are those of the CPU kernels bit for bit (on processors with FMA): one chain of fused products over
// the channels. The lowest score and of equal ones the lowest index do not depend on the order of the search.
#pragma once

#include "cuda/launch.cuh"
#include "ops/nearest_code.h"

namespace var_ext::cuda {

// A codebook and vectors in scratch memory, and where the codes found go: vector i to
// out[i / image * image_stride + i % image * stride].
struct CodeSearch {
    const float *codes, *rows, *largest;
    float* found;
    int64_t n, v, image, image_stride, stride;
    int channels, channels_packed, tiles, splits;
    int64_t* out;
    bool filter;
    // the filter's codes, see NearestCodeLayout; null if none of the searches that share them filters
    const uint32_t* low;
    const float *minus, *norms;
};

CodeSearch code_search(float* scratch, const NearestCodeLayout& layout, int64_t n, int64_t v, int64_t c,
                       int64_t* out);

// Packs V codes: the first step of a search.
void pack_codes(const char* op, const CudaStream& stream, const CodeSearch& search, const float* codebook,
                const int64_t* strides, bool cosine);
// The second and third steps, after the vectors are packed too.
void search_codes(const char* op, const CudaStream& stream, const CodeSearch& search);

}  // namespace var_ext::cuda
