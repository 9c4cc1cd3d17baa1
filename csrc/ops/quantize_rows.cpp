#include "ops/quantize_rows.h"

namespace var_ext {

QuantizeRowsParams quantize_rows_params(const TensorView& x, const TensorView& q, const TensorView& scale) {
    const char* op = "quantize_rows";
    check_dtype(op, "x", x, {DType::float32, DType::bfloat16, DType::float16});
    check_shape(op, "x", x, {{"R", any_size}, {"C", any_size}});
    const int64_t rows = x.shape[0], channels = x.shape[1];
    if (channels == 0) {
        contract_error(op, "x must have at least one channel, got shape " + x.shape_text());
    }
    if (channels > 1 && x.strides[1] != 1) {
        contract_error(op, "x must have dense channels, got a stride of " + std::to_string(x.strides[1]));
    }
    check_dtype(op, "q", q, {DType::uint8});
    check_shape(op, "q", q, {{"R", rows}, {"C", channels}});
    check_contiguous(op, "q", q);
    check_dtype(op, "scale", scale, {DType::float32});
    check_shape(op, "scale", scale, {{"R", rows}});
    check_contiguous(op, "scale", scale);
    QuantizeRowsParams p{};
    p.x = x.data;
    p.q = static_cast<uint8_t*>(q.data);
    p.scale = static_cast<float*>(scale.data);
    p.dtype = x.dtype;
    p.rows = rows;
    p.channels = channels;
    p.x_stride = x.strides[0];
    return p;
}

}  // namespace var_ext
