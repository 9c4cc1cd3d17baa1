#include "ops/attention.h"

namespace var_ext {

AttentionHeads attention_heads(const char* op, const char* name, const TensorView& view) {
    if (view.shape[3] < 1) {
        contract_error(op, std::string(name) + " must have D of at least 1, got shape " + view.shape_text());
    }
    if (view.shape[3] > 1 && view.strides[3] != 1 && view.numel() > 0) {
        contract_error(
            op, std::string(name) + " must have stride 1 along D, got " + std::to_string(view.strides[3]));
    }
    // the stride of an axis of one element is meaningless
    const auto stride = [&](size_t axis) { return view.shape[axis] > 1 ? view.strides[axis] : 0; };
    return {view.data, stride(0), stride(1), stride(2)};
}

void check_per_query(const char* op, const char* name, const TensorView& view, const TensorView& q) {
    const int64_t b = q.shape[0], l = q.shape[1], h = q.shape[2];
    check_dtype(op, name, view, {DType::float32});
    check_shape(op, name, view, {{"B", b}, {"H", h}, {"L", l}});
    if (view.numel() > 0 && ((b > 1 && view.strides[0] != h * l) || (h > 1 && view.strides[1] != l) ||
                             (l > 1 && view.strides[2] != 1))) {
        contract_error(op, std::string(name) + " must be contiguous");
    }
}

}  // namespace var_ext
