#include "ops/nearest_code.h"

#include <limits>

namespace var_ext {

NearestCodeParams nearest_code_params(const TensorView& x, const TensorView& codebook, const TensorView& out,
                                      bool cosine) {
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
    return p;
}

}  // namespace var_ext
