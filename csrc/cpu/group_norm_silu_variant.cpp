// The body of group_norm_silu, compiled once for each variant.
//
// Variances come from sums of d = x - shift and d^2, where the shift is the mean of up to 16 rows of x
// itself. So (shift - mean)^2 is at most 1/16 of the summed squares: a large mean cannot cancel, and sums of
// parts simply add up.
#include "cpu/group_norm_silu_groups.h"
#include "cpu/group_norm_silu_rows.h"

namespace {

void widen(var_ext::DType dtype, const void* in, int64_t stride, int64_t n, float* out) {
    with_type(dtype, [&](auto type) {
        using S = decltype(type);
        const S* from = static_cast<const S*>(in);
        for (int64_t i = 0; stride != 1 && i < n; ++i) {
            store_as(out + i, load_as<V>(from + i * stride, Part{1}), Part{1});
        }
        if (stride != 1) return;
        for_vectors(n, [&](int64_t i, auto part) { store_as(out + i, load_as<V>(from + i, part), part); });
    });
}

void narrow(var_ext::DType dtype, const float* in, int64_t n, void* out) {
    with_type(dtype, [&](auto type) {
        using S = decltype(type);
        S* to = static_cast<S*>(out);
        for_vectors(n, [&](int64_t i, auto part) { store_as(to + i, load_as<V>(in + i, part), part); });
    });
}

}  // namespace

namespace var_ext::cpu {

VAR_EXT_DEFINE_VARIANT(GroupNormSiluKernel, group_norm_silu) = {widen,           narrow,     groups_forward,
                                                                groups_backward, row_shift,  row_moments,
                                                                row_forward,     row_slopes, row_backward};

}  // namespace var_ext::cpu
