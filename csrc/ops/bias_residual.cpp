#include "ops/bias_residual.h"

#include <utility>

#include "ops/maps.h"

namespace var_ext {

BiasResidualParams bias_residual_params(const TensorView& h, const TensorView& x, const TensorView& bias,
                                        const TensorView& out) {
    const char* op = "bias_residual";
    check_dtype(op, "h", h, {DType::float32, DType::bfloat16, DType::float16});
    check_shape(op, "h", h, {{"B", any_size}, {"C", any_size}, {"H", any_size}, {"W", any_size}});
    const int64_t channels = h.shape[1];
    const bool channels_last = is_channels_last(op, "h", h);
    for (const auto& [name, view] : {std::pair{"x", &x}, {"out", &out}}) {
        check_dtype(op, name, *view, {h.dtype});
        check_shape(op, name, *view,
                    {{"B", h.shape[0]}, {"C", channels}, {"H", h.shape[2]}, {"W", h.shape[3]}});
        check_layout(op, name, *view, "h", channels_last);
    }
    check_dtype(op, "bias", bias, {h.dtype});
    check_shape(op, "bias", bias, {{"C", channels}});
    check_contiguous(op, "bias", bias);
    BiasResidualParams p{};
    p.h = h.data;
    p.x = x.data;
    p.bias = bias.data;
    p.out = out.data;
    p.dtype = h.dtype;
    p.batch = h.shape[0];
    p.channels = channels;
    p.pixels = h.shape[2] * h.shape[3];
    p.channels_last = channels_last;
    return p;
}

}  // namespace var_ext
