#include "ops/qk_norm.h"

namespace var_ext {

namespace {

// Checks the other tensors against qkv, (B, L, 3, H, D).
struct Checker {
    const char* op;
    int64_t batch, length, heads, channels;
    DType dtype;

    Checker(const char* name, const TensorView& qkv) : op(name) {
        check_dtype(op, "qkv", qkv, {DType::float32, DType::bfloat16, DType::float16});
        check_shape(op, "qkv", qkv,
                    {{"B", any_size}, {"L", any_size}, {"3", 3}, {"H", any_size}, {"D", any_size}});
        batch = qkv.shape[0];
        length = qkv.shape[1];
        heads = qkv.shape[3];
        channels = qkv.shape[4];
        dtype = qkv.dtype;
    }
    void contiguous(const char* name, const TensorView& view) const {
        check_dtype(op, name, view, {dtype});
        if (view.strides.back() != 1 && view.shape.back() > 1 && view.numel() > 0) {
            contract_error(op, std::string(name) + " must have contiguous channels, got stride " +
                                   std::to_string(view.strides.back()));
        }
    }
    template <class Pointer>
    void packed(const char* name, const TensorView& view, HeadsOf<Pointer>* parts) const {
        check_shape(op, name, view, {{"B", batch}, {"L", length}, {"3", 3}, {"H", heads}, {"D", channels}});
        contiguous(name, view);
        for (int64_t i = 0; i < 3; ++i) {
            char* first = static_cast<char*>(view.data) + i * view.strides[2] * dtype_size(dtype);
            parts[i] = {first, view.strides[0], view.strides[1], view.strides[3]};
        }
    }
    ConstHeads part(const char* name, const TensorView& view) const {
        check_shape(op, name, view, {{"B", batch}, {"L", length}, {"H", heads}, {"D", channels}});
        contiguous(name, view);
        return {view.data, view.strides[0], view.strides[1], view.strides[2]};
    }
    Heads target(const char* name, const TensorView& view) const {
        const ConstHeads at = part(name, view);
        check_output(op, name, view);
        return {view.data, at.b, at.l, at.h};
    }
    void bias(const char* name, const TensorView& view) const {
        check_shape(op, name, view, {{"H", heads}, {"D", channels}});
        contiguous(name, view);
    }
    void scale(const char* name, const TensorView* view) const {
        if (view == nullptr) return;
        check_dtype(op, name, *view, {dtype});
        check_shape(op, name, *view, {{"H", heads}});
    }
};

}  // namespace

QkNormParams qk_norm_params(const TensorView& qkv, const TensorView& q_bias, const TensorView& v_bias,
                            const TensorView* log_scale, const TensorView& q, const TensorView& k,
                            const TensorView& v) {
    return qk_norm_params_of("qk_norm", qkv, q_bias, v_bias, log_scale, q, k, v);
}

QkNormParams qk_norm_params_of(const char* op, const TensorView& qkv, const TensorView& q_bias,
                               const TensorView& v_bias, const TensorView* log_scale, const TensorView& q,
                               const TensorView& k, const TensorView& v) {
    const Checker checked(op, qkv);
    checked.bias("q_bias", q_bias);
    checked.bias("v_bias", v_bias);
    checked.scale("log_scale", log_scale);
    QkNormParams p;
    p.dtype = qkv.dtype;
    p.batch = checked.batch;
    p.length = checked.length;
    p.heads = checked.heads;
    p.channels = checked.channels;
    checked.packed("qkv", qkv, p.qkv);
    p.q_bias = {q_bias.data, 0, 0, q_bias.strides[0]};
    p.v_bias = {v_bias.data, 0, 0, v_bias.strides[0]};
    p.log_scale = log_scale ? log_scale->data : nullptr;
    p.log_scale_stride = log_scale ? log_scale->strides[0] : 0;
    p.out[0] = checked.target("q", q);
    p.out[1] = checked.target("k", k);
    p.out[2] = checked.target("v", v);
    return p;
}

QkNormBackwardParams qk_norm_backward_params(const TensorView& grad_q, const TensorView& grad_k,
                                             const TensorView& grad_v, const TensorView& qkv,
                                             const TensorView& q_bias, const TensorView* log_scale,
                                             const TensorView& grad_qkv, const TensorView& grad_q_bias,
                                             const TensorView& grad_v_bias, const TensorView* grad_log_scale,
                                             const TensorView* scratch) {
    const char* op = "qk_norm";
    const Checker checked(op, qkv);
    checked.bias("q_bias", q_bias);
    checked.scale("log_scale", log_scale);
    checked.bias("grad_q_bias", grad_q_bias);
    checked.bias("grad_v_bias", grad_v_bias);
    checked.scale("grad_log_scale", grad_log_scale);
    check_output(op, "grad_qkv", grad_qkv);
    check_output(op, "grad_q_bias", grad_q_bias);
    check_output(op, "grad_v_bias", grad_v_bias);
    if (grad_log_scale != nullptr) check_output(op, "grad_log_scale", *grad_log_scale);
    if ((log_scale == nullptr) != (grad_log_scale == nullptr)) {
        contract_error(op, "log_scale and its gradient must be given together, got one of them");
    }
    QkNormBackwardParams p;
    p.dtype = qkv.dtype;
    p.batch = checked.batch;
    p.length = checked.length;
    p.heads = checked.heads;
    p.channels = checked.channels;
    p.grad_out[0] = checked.part("grad_q", grad_q);
    p.grad_out[1] = checked.part("grad_k", grad_k);
    p.grad_out[2] = checked.part("grad_v", grad_v);
    checked.packed("qkv", qkv, p.qkv);
    checked.packed("grad_qkv", grad_qkv, p.grad_qkv);
    p.q_bias = {q_bias.data, 0, 0, q_bias.strides[0]};
    p.log_scale = log_scale ? log_scale->data : nullptr;
    p.log_scale_stride = log_scale ? log_scale->strides[0] : 0;
    p.grad_q_bias = {grad_q_bias.data, 0, 0, grad_q_bias.strides[0]};
    p.grad_v_bias = {grad_v_bias.data, 0, 0, grad_v_bias.strides[0]};
    p.grad_log_scale = grad_log_scale ? grad_log_scale->data : nullptr;
    p.grad_log_scale_stride = grad_log_scale ? grad_log_scale->strides[0] : 0;
    p.scratch = nullptr;
    p.partials = 0;
    if (scratch != nullptr) {
        check_dtype(op, "scratch", *scratch, {DType::float32});
        check_shape(op, "scratch", *scratch,
                    {{"P", any_size}, {"H", p.heads}, {"2 D + 1", 2 * p.channels + 1}});
        check_contiguous(op, "scratch", *scratch);
        p.scratch = static_cast<float*>(scratch->data);
        p.partials = scratch->shape[0];
    }
    return p;
}

}  // namespace var_ext
