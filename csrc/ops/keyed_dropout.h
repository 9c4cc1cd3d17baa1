// keyed_dropout: y = x * mask * 2^16 / kept. The mask has 16 bits an element of a counter that is hashed with
// the key of a row; the gradient is the same function.
#pragma once

#include <cstdint>

#include "common/stream.h"
#include "common/tensor_view.h"

namespace var_ext {

// Word i of a row is splitmix64(key + first + step (i + 1)); its lanes of 16 bits, the lowest
// first, are of the numbers 4 i to 4 i + 3. An element is kept if its lane, signed, is below the threshold.
struct KeyedDropoutParams {
    const void* x;           // (rows, size), dense
    const int64_t* keys;     // (rows,)
    const int64_t* counter;  // (2,): first and step
    void* out;               // (rows, size), dense
    DType dtype;             // of x and out: float32, bfloat16, float16; the product is float32
    int64_t rows, size;
    // Of a row that is (channels, pixels), whose numbers count channels last: element i has number
    // i % pixels * channels + i / pixels. 1: number i.
    int64_t channels;
    int32_t threshold;
    float scale;
};

// Checks the contract; throws std::invalid_argument. x and out are (B, ...), contiguous, or as maps
// (B, C, H, W) channels-last, both alike; keys are (B,).
KeyedDropoutParams keyed_dropout_params(const TensorView& x, const TensorView& keys,
                                        const TensorView& counter, const TensorView& out, int64_t kept);

namespace cpu {
void keyed_dropout(const KeyedDropoutParams& p);
}  // namespace cpu
namespace cuda {
void keyed_dropout(const KeyedDropoutParams& p, const CudaStream& stream);
}  // namespace cuda

}  // namespace var_ext
