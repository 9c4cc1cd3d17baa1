#include "ops/cross_entropy.h"

namespace var_ext {

namespace {

void check_rows(const char* op, const char* name, const TensorView& view, DType dtype,
                const TensorView& logits) {
    check_dtype(op, name, view, {dtype});
    check_contiguous(op, name, view);
    if (view.shape != std::vector<int64_t>(logits.shape.begin(), logits.shape.end() - 1)) {
        contract_error(op, std::string(name) + " must have the shape of logits without its last axis, " +
                               logits.shape_text() + ", got " + view.shape_text());
    }
}

CrossEntropyParams checked(const char* op, const TensorView& logits, const TensorView& targets,
                           const TensorView& stats, double smoothing) {
    check_dtype(op, "logits", logits, {DType::float32});
    check_contiguous(op, "logits", logits);
    if (logits.dim() < 1 || logits.shape.back() < 1) {
        contract_error(op, "logits must have shape (..., V), V at least 1, got " + logits.shape_text());
    }
    check_rows(op, "targets", targets, DType::int64, logits);
    check_dtype(op, "stats", stats, {DType::float32});
    check_contiguous(op, "stats", stats);
    check_shape(op, "stats", stats, {{"rows", targets.numel()}, {"2", 2}});
    CrossEntropyParams p{};
    p.logits = static_cast<const float*>(logits.data);
    p.targets = static_cast<const int64_t*>(targets.data);
    p.stats = static_cast<float*>(stats.data);
    p.rows = targets.numel();
    p.classes = logits.shape.back();
    p.smoothing = static_cast<float>(smoothing);
    return p;
}

}  // namespace

CrossEntropyParams cross_entropy_params(const TensorView& logits, const TensorView& targets,
                                        const TensorView& losses, const TensorView& stats, double smoothing) {
    const char* op = "cross_entropy";
    CrossEntropyParams p = checked(op, logits, targets, stats, smoothing);
    check_rows(op, "losses", losses, DType::float32, logits);
    p.losses = static_cast<float*>(losses.data);
    return p;
}

CrossEntropyParams cross_entropy_backward_params(const TensorView& grad, const TensorView& logits,
                                                 const TensorView& targets, const TensorView& stats,
                                                 const TensorView& grad_logits, double smoothing) {
    const char* op = "cross_entropy_backward";
    CrossEntropyParams p = checked(op, logits, targets, stats, smoothing);
    check_rows(op, "grad", grad, DType::float32, logits);
    check_dtype(op, "grad_logits", grad_logits, {DType::float32});
    check_contiguous(op, "grad_logits", grad_logits);
    if (grad_logits.shape != logits.shape) {
        contract_error(op, "grad_logits must have the shape of logits, " + logits.shape_text() + ", got " +
                               grad_logits.shape_text());
    }
    p.grad = static_cast<const float*>(grad.data);
    p.grad_logits = static_cast<float*>(grad_logits.data);
    return p;
}

}  // namespace var_ext
