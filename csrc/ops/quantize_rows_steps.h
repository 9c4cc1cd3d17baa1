// The arithmetic of quantize_rows, shared by CPU and CUDA kernels. Without linkage, as the variant files of
// csrc/cpu include it (see cpu/vec.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace {

// x * inverse + shift, each step rounded to float32, has 128 + the integer nearest to x / scale in its lowest
// byte, ties to even: numbers around 1.5 * 2^23 are one apart. The scale is rounded up, so the integer is in
// [-127, 127] without a clamp.
constexpr float quantize_shift = 12582912.0f + 128.0f;
constexpr uint8_t quantize_zero = 128;  // encodes 0, and all elements of a row that is not finite

struct QuantizedRow {
    float scale, inverse;
    bool finite;
};

// From the bits of the row's largest |x| in float32, which have the order of the numbers: infinity is above
// all of them and NaN above infinity.
VAR_EXT_HOST_DEVICE inline QuantizedRow quantized_row(uint32_t largest) {
    constexpr float least = 0x1p-120f;  // no quotient is lost below: subnormal numbers are 0 then, as bytes
    constexpr uint32_t infinity = 0x7f800000, nan = 0x7fc00000;
    float scale;
    if (largest == 0) return {1.0f, 1.0f, true};
    if (largest >= infinity) {
        memcpy(&scale, &nan, 4);
        return {scale, 0.0f, false};
    }
    memcpy(&scale, &largest, 4);
    scale /= 127.0f;
    uint32_t bits;
    memcpy(&bits, &scale, 4);
    bits = (bits + 0xffff) & 0xffff0000;  // up to a bfloat16 number
    memcpy(&scale, &bits, 4);
    if (scale < least) scale = least;
    return {scale, 1.0f / scale, true};
}

}  // namespace
