// What a variant of group_norm_silu offers to the entry. Plain functions and pointers only, see resample.h.
#pragma once

#include <cstdint>

#include "cpu/variants.h"
#include "ops/group_norm_silu.h"

namespace var_ext::cpu {

// What the maps of an image need, a value for each channel (an array of `padded` floats each): the mean of
// the group less the channel's input_bias, the group's reciprocal deviation, weight and bias; and for
// backward the means over the group of weight
// * slope and of weight * slope * normed x.
enum Coefficient { mean, rstd, weight, bias, slope_mean, slope_normed_mean, coefficients };

// Channels are padded to whole vectors of any variant. Static: each variant compiles its own.
static constexpr int64_t padded_channels(int64_t channels) noexcept {
    return (channels + 15) / 16 * 16;
}

// Dense parameters, (C,); input_bias may be null.
struct GroupNormSiluChannels {
    const float *weight, *bias, *input_bias;
};

struct GroupNormSiluKernel {
    // Parameters to dense float32, and gradients back.
    void (*widen)(DType dtype, const void* in, int64_t stride, int64_t n, float* out);
    void (*narrow)(DType dtype, const float* in, int64_t n, void* out);

    // Contiguous maps: groups [begin, end) of all B * groups, wholly. Backward leaves
    // the sums of slope * normed x and of slope over each map in `sums`, (B, 2, padded).
    void (*groups_forward)(const GroupNormSiluParams& p, const GroupNormSiluChannels& channels, int64_t begin,
                           int64_t end);
    void (*groups_backward)(const GroupNormSiluParams& p, const GroupNormSiluChannels& channels,
                            int64_t begin, int64_t end, float* sums);

    // Channels-last maps: pixels [begin, end) of one image. `shift`: (padded), a rough mean of each channel's
    // group less its input_bias, (C,); `sums`: (2, padded) of x - shift and its square; backward: of slope *
    // normed x and slope.
    void (*shift)(const GroupNormSiluParams& p, int64_t image, const float* input_bias, float* shift);
    void (*moments)(const GroupNormSiluParams& p, int64_t image, int64_t begin, int64_t end,
                    const float* shift, float* sums);
    void (*forward)(const GroupNormSiluParams& p, int64_t image, int64_t begin, int64_t end,
                    const float* coefficients);
    void (*slopes)(const GroupNormSiluParams& p, int64_t image, int64_t begin, int64_t end,
                   const float* coefficients, float* sums);
    void (*backward)(const GroupNormSiluParams& p, int64_t image, int64_t begin, int64_t end,
                     const float* coefficients);
};

VAR_EXT_DECLARE_VARIANTS(GroupNormSiluKernel, group_norm_silu);

}  // namespace var_ext::cpu
