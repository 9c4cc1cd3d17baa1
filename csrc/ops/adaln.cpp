#include "ops/adaln.h"

namespace var_ext {

namespace {

constexpr const char* op = "adaln";

// Checks that `view` is (B, L, C) or, for a vector a sample, (B, C); both with contiguous channels.
struct Checker {
    const TensorView& x;

    void check(const char* name, const TensorView& view, bool vector) const {
        check_dtype(op, name, view, {x.dtype});
        if (vector) {
            check_shape(op, name, view, {{"B", x.shape[0]}, {"C", x.shape[2]}});
        } else {
            check_shape(op, name, view, {{"B", x.shape[0]}, {"L", x.shape[1]}, {"C", x.shape[2]}});
        }
        if (view.strides.back() != 1 && view.shape.back() > 1 && view.numel() > 0) {
            contract_error(op, std::string(name) + " must have contiguous channels, got stride " +
                                   std::to_string(view.strides.back()));
        }
    }
    template <class Pointer>
    static RowsOf<Pointer> rows(const TensorView& view) {
        return {view.data, view.strides[0], view.dim() == 3 ? view.strides[1] : 0};
    }
    ConstRows in(const char* name, const TensorView* view, bool vector = false) const {
        if (view == nullptr) return {};
        check(name, *view, vector);
        return rows<const void*>(*view);
    }
    Rows out(const char* name, const TensorView* view, bool vector = false) const {
        if (view == nullptr) return {};
        check(name, *view, vector);
        check_output(op, name, *view);
        return rows<void*>(*view);
    }
};

Checker checker(const TensorView& x) {
    check_dtype(op, "x", x, {DType::float32, DType::bfloat16, DType::float16});
    check_shape(op, "x", x, {{"B", any_size}, {"L", any_size}, {"C", any_size}});
    return {x};
}

void check_residual(std::initializer_list<const TensorView*> views) {
    for (const TensorView* view : views) {
        if ((view == nullptr) != (*views.begin() == nullptr)) {
            contract_error(op, "the tensors of the residual must be given together, got some of them");
        }
    }
}

}  // namespace

AdalnParams adaln_params(const TensorView& x, const TensorView& scale, const TensorView& shift,
                         const TensorView* branch, const TensorView* gate, const TensorView* h,
                         const TensorView& y, double eps) {
    const Checker checked = checker(x);
    check_residual({branch, gate, h});
    AdalnParams p;
    p.dtype = x.dtype;
    p.batch = x.shape[0];
    p.length = x.shape[1];
    p.channels = x.shape[2];
    p.eps = static_cast<float>(eps);
    p.x = checked.in("x", &x);
    p.scale = checked.in("scale", &scale, true);
    p.shift = checked.in("shift", &shift, true);
    p.branch = checked.in("branch", branch);
    p.gate = checked.in("gate", gate, true);
    p.h = checked.out("h", h);
    p.y = checked.out("y", &y);
    return p;
}

AdalnBackwardParams adaln_backward_params(const TensorView& grad_y, const TensorView& x,
                                          const TensorView& scale, const TensorView* grad_h,
                                          const TensorView* branch, const TensorView* gate,
                                          const TensorView& grad_x, const TensorView& grad_scale,
                                          const TensorView& grad_shift, const TensorView* grad_branch,
                                          const TensorView* grad_gate, const TensorView* scratch,
                                          double eps) {
    const Checker checked = checker(x);
    check_residual({branch, gate, grad_h, grad_branch, grad_gate});
    AdalnBackwardParams p;
    p.dtype = x.dtype;
    p.batch = x.shape[0];
    p.length = x.shape[1];
    p.channels = x.shape[2];
    p.eps = static_cast<float>(eps);
    p.grad_y = checked.in("grad_y", &grad_y);
    p.x = checked.in("x", &x);
    p.scale = checked.in("scale", &scale, true);
    p.grad_h = checked.in("grad_h", grad_h);
    p.branch = checked.in("branch", branch);
    p.gate = checked.in("gate", gate, true);
    p.grad_x = checked.out("grad_x", &grad_x);
    p.grad_scale = checked.out("grad_scale", &grad_scale, true);
    p.grad_shift = checked.out("grad_shift", &grad_shift, true);
    p.grad_branch = checked.out("grad_branch", grad_branch);
    p.grad_gate = checked.out("grad_gate", grad_gate, true);
    p.scratch = nullptr;
    p.partials = 0;
    if (scratch != nullptr) {
        check_dtype(op, "scratch", *scratch, {DType::float32});
        check_shape(op, "scratch", *scratch,
                    {{"B", p.batch}, {"P", any_size}, {"vectors", branch ? 3 : 2}, {"C", p.channels}});
        check_contiguous(op, "scratch", *scratch);
        p.scratch = static_cast<float*>(scratch->data);
        p.partials = scratch->shape[1];
    }
    return p;
}

}  // namespace var_ext
