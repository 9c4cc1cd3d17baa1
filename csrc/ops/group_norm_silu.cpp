#include "ops/group_norm_silu.h"

#include <utility>

#include "ops/maps.h"

namespace var_ext {

namespace {

GroupNormSiluParams checked(const char* op, const TensorView& x, const TensorView& weight,
                            const TensorView& bias, const TensorView* input_bias, const char* out_name,
                            const TensorView& out, int64_t groups, double eps) {
    check_dtype(op, "x", x, {DType::float32, DType::bfloat16, DType::float16});
    check_shape(op, "x", x, {{"B", any_size}, {"C", any_size}, {"H", any_size}, {"W", any_size}});
    const int64_t channels = x.shape[1];
    check_dtype(op, "weight", weight, {x.dtype});
    check_shape(op, "weight", weight, {{"C", channels}});
    check_dtype(op, "bias", bias, {x.dtype});
    check_shape(op, "bias", bias, {{"C", channels}});
    if (input_bias != nullptr) {
        check_dtype(op, "input_bias", *input_bias, {x.dtype});
        check_shape(op, "input_bias", *input_bias, {{"C", channels}});
    }
    check_dtype(op, out_name, out, {x.dtype});
    check_shape(op, out_name, out,
                {{"B", x.shape[0]}, {"C", channels}, {"H", x.shape[2]}, {"W", x.shape[3]}});
    if (groups < 1 || channels % groups != 0) {
        contract_error(
            op, "groups must divide C = " + std::to_string(channels) + ", got " + std::to_string(groups));
    }
    GroupNormSiluParams p{};
    p.channels_last = is_channels_last(op, "x", x);
    check_layout(op, out_name, out, "x", p.channels_last);
    p.x = x.data;
    p.weight = weight.data;
    p.bias = bias.data;
    p.out = out.data;
    p.dtype = x.dtype;
    p.batch = x.shape[0];
    p.channels = channels;
    p.pixels = x.shape[2] * x.shape[3];
    p.groups = groups;
    p.weight_stride = weight.strides[0];
    p.bias_stride = bias.strides[0];
    p.eps = eps;
    if (input_bias != nullptr) {
        p.input_bias = input_bias->data;
        p.input_bias_stride = input_bias->strides[0];
    }
    return p;
}

float* pairs_of_groups(const char* op, const char* name, const GroupNormSiluParams& p,
                       const TensorView* view) {
    if (view == nullptr) return nullptr;
    check_dtype(op, name, *view, {DType::float32});
    check_shape(op, name, *view, {{"B", p.batch}, {"groups", p.groups}, {"2", 2}});
    check_contiguous(op, name, *view);
    return static_cast<float*>(view->data);
}

void set_scratch(const char* op, GroupNormSiluParams& p, const TensorView* stats, const TensorView* scratch) {
    p.stats = pairs_of_groups(op, "stats", p, stats);
    if (scratch == nullptr) return;
    check_dtype(op, "scratch", *scratch, {DType::float32});
    check_shape(op, "scratch", *scratch, {{"B", p.batch}, {"P", any_size}, {"C", p.channels}, {"2", 2}});
    check_contiguous(op, "scratch", *scratch);
    p.scratch = static_cast<float*>(scratch->data);
    p.partials = scratch->shape[1];
}

}  // namespace

GroupNormSiluParams group_norm_silu_params(const TensorView& x, const TensorView& weight,
                                           const TensorView& bias, const TensorView* input_bias,
                                           const TensorView& out, const TensorView* stats,
                                           const TensorView* scratch, int64_t groups, double eps) {
    const char* op = "group_norm_silu";
    GroupNormSiluParams p = checked(op, x, weight, bias, input_bias, "out", out, groups, eps);
    set_scratch(op, p, stats, scratch);
    return p;
}

GroupNormSiluParams group_norm_silu_backward_params(const TensorView& grad, const TensorView& x,
                                                    const TensorView& weight, const TensorView& bias,
                                                    const TensorView* input_bias, const TensorView& grad_x,
                                                    const TensorView& grad_weight,
                                                    const TensorView& grad_bias, const TensorView* stats,
                                                    const TensorView* means, const TensorView* scratch,
                                                    int64_t groups, double eps) {
    const char* op = "group_norm_silu_backward";
    GroupNormSiluParams p = checked(op, x, weight, bias, input_bias, "grad_x", grad_x, groups, eps);
    check_dtype(op, "grad", grad, {x.dtype});
    check_shape(op, "grad", grad, {{"B", p.batch}, {"C", p.channels}, {"H", x.shape[2]}, {"W", x.shape[3]}});
    check_layout(op, "grad", grad, "x", p.channels_last);
    for (const auto& [name, view] : {std::pair{"grad_weight", &grad_weight}, {"grad_bias", &grad_bias}}) {
        check_dtype(op, name, *view, {x.dtype});
        check_shape(op, name, *view, {{"C", p.channels}});
        if (p.channels > 1 && view->strides[0] != 1) {
            contract_error(
                op, std::string(name) + " must be dense, got stride " + std::to_string(view->strides[0]));
        }
    }
    set_scratch(op, p, stats, scratch);
    p.means = pairs_of_groups(op, "means", p, means);
    p.grad = grad.data;
    p.grad_weight = grad_weight.data;
    p.grad_bias = grad_bias.data;
    return p;
}

}  // namespace var_ext
