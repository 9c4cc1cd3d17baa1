#include "ops/bias_gelu.h"

namespace var_ext {

namespace {

// The row stride of (..., C), if it is the same for all rows.
int64_t row_stride(const char* op, const char* name, const TensorView& view) {
    int64_t channels = view.shape.back(), stride = channels, step = 0;
    if (view.numel() == 0) return stride;
    bool regular = channels == 1 || view.strides.back() == 1;
    for (int64_t axis = view.dim() - 2; axis >= 0; --axis) {
        if (view.shape[axis] == 1) continue;
        if (step == 0) stride = step = view.strides[axis];
        regular = regular && view.strides[axis] == step;
        step *= view.shape[axis];
    }
    if (!regular) {
        contract_error(op, std::string(name) +
                               " must have dense channels and rows at equal distances, got shape " +
                               view.shape_text() + " of other strides");
    }
    return stride;
}

void check_dense(const char* op, const char* name, const TensorView& view) {
    if (row_stride(op, name, view) != view.shape.back()) {
        contract_error(op, std::string(name) + " must be contiguous, got shape " + view.shape_text() +
                               " of other strides");
    }
}

void check_like(const char* op, const char* name, const TensorView& view, const char* other,
                const TensorView& like) {
    check_dtype(op, name, view, {like.dtype});
    if (view.shape != like.shape) {
        contract_error(op, std::string(name) + " must have the shape of " + other + ", " + like.shape_text() +
                               ", got " + view.shape_text());
    }
}

BiasGeluParams checked(const char* op, const TensorView& x, const TensorView& bias, const char* out_name,
                       const TensorView& out) {
    check_dtype(op, "x", x, {DType::float32, DType::bfloat16, DType::float16});
    if (x.dim() < 1) contract_error(op, "x must have shape (..., C), got ()");
    check_dtype(op, "bias", bias, {x.dtype});
    check_shape(op, "bias", bias, {{"C", x.shape.back()}});
    check_dense(op, "bias", bias);
    check_like(op, out_name, out, "x", x);
    check_dense(op, out_name, out);
    BiasGeluParams p{};
    p.x = x.data;
    p.bias = bias.data;
    p.out = out.data;
    p.dtype = x.dtype;
    p.channels = x.shape.back();
    p.rows = p.channels == 0 ? 0 : x.numel() / p.channels;
    p.x_stride = row_stride(op, "x", x);
    return p;
}

}  // namespace

BiasGeluParams bias_gelu_params(const TensorView& x, const TensorView& bias, const TensorView& out) {
    return checked("bias_gelu", x, bias, "out", out);
}

BiasGeluParams bias_gelu_backward_params(const TensorView& grad, const TensorView& x, const TensorView& bias,
                                         const TensorView& grad_x, const TensorView& grad_bias,
                                         const TensorView* scratch) {
    const char* op = "bias_gelu_backward";
    BiasGeluParams p = checked(op, x, bias, "grad_x", grad_x);
    check_like(op, "grad", grad, "x", x);
    check_like(op, "grad_bias", grad_bias, "bias", bias);
    check_dense(op, "grad_bias", grad_bias);
    p.grad = grad.data;
    p.grad_bias = grad_bias.data;
    p.grad_stride = row_stride(op, "grad", grad);
    if (scratch != nullptr) {
        check_dtype(op, "scratch", *scratch, {DType::float32});
        check_shape(op, "scratch", *scratch, {{"P", any_size}, {"C", p.channels}});
        check_contiguous(op, "scratch", *scratch);
        p.scratch = static_cast<float*>(scratch->data);
        p.partials = scratch->shape[0];
    }
    return p;
}

}  // namespace var_ext
