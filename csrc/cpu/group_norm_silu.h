// What a variant of group_norm_silu offers to the entry. Plain functions and pointers only, see resample.h.
#pragma once

#include <cstdint>

#include "ops/group_norm_silu.h"

namespace var_ext::cpu {

// What the maps of an image need, a value for each channel (an array of `padded` floats each): the mean and
// the reciprocal deviation of the group, weight and bias; and for backward the means over the group of weight
// * slope and of weight * slope * normed x.
enum Coefficient { mean, rstd, weight, bias, slope_mean, slope_normed_mean, coefficients };

// Channels are padded to whole vectors of any variant. Static: each variant compiles its own.
static constexpr int64_t padded_channels(int64_t channels) noexcept {
    return (channels + 15) / 16 * 16;
}

struct GroupNormSiluKernel {
    // Parameters to dense float32, and gradients back.
    void (*widen)(DType dtype, const void* in, int64_t stride, int64_t n, float* out);
    void (*narrow)(DType dtype, const float* in, int64_t n, void* out);

    // Contiguous maps: groups [begin, end) of all B * groups, wholly. `weight`, `bias`: (C,). Backward leaves
    // the sums of slope * normed x and of slope over each map in `sums`, (B, 2, padded).
    void (*groups_forward)(const GroupNormSiluParams& p, const float* weight, const float* bias,
                           int64_t begin, int64_t end);
    void (*groups_backward)(const GroupNormSiluParams& p, const float* weight, const float* bias,
                            int64_t begin, int64_t end, float* sums);

    // Channels-last maps: pixels [begin, end) of one image. `shift`: (padded), a rough mean of each channel's
    // group; `sums`: (2, padded) of x - shift and its square; backward: of slope * normed x and slope.
    void (*shift)(const GroupNormSiluParams& p, int64_t image, float* shift);
    void (*moments)(const GroupNormSiluParams& p, int64_t image, int64_t begin, int64_t end,
                    const float* shift, float* sums);
    void (*forward)(const GroupNormSiluParams& p, int64_t image, int64_t begin, int64_t end,
                    const float* coefficients);
    void (*slopes)(const GroupNormSiluParams& p, int64_t image, int64_t begin, int64_t end,
                   const float* coefficients, float* sums);
    void (*backward)(const GroupNormSiluParams& p, int64_t image, int64_t begin, int64_t end,
                     const float* coefficients);
};

extern const GroupNormSiluKernel group_norm_silu_portable, group_norm_silu_avx2, group_norm_silu_avx512,
    group_norm_silu_avx512_bf16;

}  // namespace var_ext::cpu
