#include "ops/linear.h"

namespace var_ext {

namespace {

void check_float(const char* op, const char* name, const TensorView& view) {
    check_dtype(op, name, view, {DType::float32, DType::bfloat16});
    check_contiguous(op, name, view);
}

// The shape of `like` with a last axis of its own.
void check_rows(const char* op, const char* name, const TensorView& view, const TensorView& like,
                int64_t columns) {
    check_dtype(op, name, view, {like.dtype});
    check_contiguous(op, name, view);
    std::vector<int64_t> wanted = like.shape;
    wanted.back() = columns;
    if (view.shape != wanted) {
        contract_error(op, std::string(name) + " must have the shape of x but " + std::to_string(columns) +
                               " columns, got " + view.shape_text());
    }
}

LinearParams checked(const char* op, const TensorView& x, const TensorView& weight, bool bf16) {
    check_float(op, "x", x);
    check_float(op, "weight", weight);
    if (x.dim() < 1) contract_error(op, "x must have shape (..., N), got ()");
    check_shape(op, "weight", weight, {{"M", any_size}, {"N", x.shape.back()}});
    LinearParams p{};
    p.x = x.data;
    p.weight = weight.data;
    p.dtype = x.dtype;
    p.weight_dtype = p.bias_dtype = weight.dtype;
    p.rows = 1;
    for (int64_t axis = 0; axis + 1 < x.dim(); ++axis) p.rows *= x.shape[axis];
    p.inputs = x.shape.back();
    p.outputs = weight.shape[0];
    p.bf16 = bf16;
    return p;
}

}  // namespace

LinearParams linear_params(const TensorView& x, const TensorView& weight, const TensorView* bias,
                           const TensorView& out, bool bf16) {
    const char* op = "linear";
    LinearParams p = checked(op, x, weight, bf16);
    if (bias) {
        check_float(op, "bias", *bias);
        check_shape(op, "bias", *bias, {{"M", p.outputs}});
        p.bias = bias->data;
        p.bias_dtype = bias->dtype;
    }
    check_rows(op, "out", out, x, p.outputs);
    p.out = out.data;
    return p;
}

LinearParams linear_backward_params(const TensorView& grad, const TensorView& x, const TensorView& weight,
                                    const TensorView* grad_x, const TensorView* grad_weight,
                                    const TensorView* grad_bias, bool bf16) {
    const char* op = "linear_backward";
    LinearParams p = checked(op, x, weight, bf16);
    check_rows(op, "grad", grad, x, p.outputs);
    p.grad = grad.data;
    if (grad_x) {
        check_rows(op, "grad_x", *grad_x, x, p.inputs);
        p.grad_x = grad_x->data;
    }
    if (grad_weight) {
        check_dtype(op, "grad_weight", *grad_weight, {weight.dtype});
        check_contiguous(op, "grad_weight", *grad_weight);
        check_shape(op, "grad_weight", *grad_weight, {{"M", p.outputs}, {"N", p.inputs}});
        p.grad_weight = grad_weight->data;
    }
    if (grad_bias) {
        check_float(op, "grad_bias", *grad_bias);
        check_shape(op, "grad_bias", *grad_bias, {{"M", p.outputs}});
        p.grad_bias = grad_bias->data;
        p.bias_dtype = grad_bias->dtype;
    }
    return p;
}

}  // namespace var_ext
