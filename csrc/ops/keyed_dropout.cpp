#include "ops/keyed_dropout.h"

#include "ops/maps.h"

namespace var_ext {

KeyedDropoutParams keyed_dropout_params(const TensorView& x, const TensorView& keys,
                                        const TensorView& counter, const TensorView& out, int64_t kept) {
    const char* op = "keyed_dropout";
    check_dtype(op, "x", x, {DType::float32, DType::bfloat16, DType::float16});
    if (x.dim() < 1) contract_error(op, "x must have shape (B, ...), got ()");
    check_dtype(op, "out", out, {x.dtype});
    if (out.shape != x.shape) {
        contract_error(op, "out must have the shape of x, " + x.shape_text() + ", got " + out.shape_text());
    }
    check_dtype(op, "keys", keys, {DType::int64});
    check_shape(op, "keys", keys, {{"B", x.shape[0]}});
    check_contiguous(op, "keys", keys);
    check_dtype(op, "counter", counter, {DType::int64});
    check_shape(op, "counter", counter, {{"2", 2}});
    check_contiguous(op, "counter", counter);
    if (kept < 1 || kept >= 1 << 16) {
        contract_error(op, "kept must be in 1..65535, of 2^16, got " + std::to_string(kept));
    }
    KeyedDropoutParams p{};
    p.channels = 1;
    if (x.dim() == 4) {
        const bool channels_last = is_channels_last(op, "x", x);
        check_layout(op, "out", out, "x", channels_last);
        if (!channels_last && x.shape[2] * x.shape[3] > 1) p.channels = x.shape[1];
    } else {
        check_contiguous(op, "x", x);
        check_contiguous(op, "out", out);
    }
    p.x = x.data;
    p.keys = static_cast<const int64_t*>(keys.data);
    p.counter = static_cast<const int64_t*>(counter.data);
    p.out = out.data;
    p.dtype = x.dtype;
    p.rows = x.shape[0];
    p.size = p.rows == 0 ? 0 : x.numel() / p.rows;
    p.threshold = static_cast<int32_t>(kept) - (1 << 15);
    p.scale = static_cast<float>(65536.0 / static_cast<double>(kept));
    return p;
}

}  // namespace var_ext
