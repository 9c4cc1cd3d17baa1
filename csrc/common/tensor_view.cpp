#include "common/tensor_view.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace var_ext {

const char* dtype_name(DType dtype) {
    switch (dtype) {
        case DType::float32:
            return "float32";
        case DType::float64:
            return "float64";
        case DType::bfloat16:
            return "bfloat16";
        case DType::float16:
            return "float16";
        case DType::int64:
            return "int64";
        case DType::uint8:
            return "uint8";
    }
    return "unknown";
}

int64_t dtype_size(DType dtype) {
    switch (dtype) {
        case DType::float32:
            return 4;
        case DType::float64:
            return 8;
        case DType::bfloat16:
            return 2;
        case DType::float16:
            return 2;
        case DType::int64:
            return 8;
        case DType::uint8:
            return 1;
    }
    return 0;
}

namespace {

std::string tuple_text(const std::vector<int64_t>& values) {
    std::string text = "(";
    for (size_t i = 0; i < values.size(); ++i) {
        if (i > 0) text += ", ";
        text += std::to_string(values[i]);
    }
    return text + (values.size() == 1 ? ",)" : ")");
}

}  // namespace

TensorView::TensorView(uintptr_t address, std::vector<int64_t> shape_, std::vector<int64_t> strides_,
                       DType dtype_)
    : data(reinterpret_cast<void*>(address)),
      shape(std::move(shape_)),
      strides(std::move(strides_)),
      dtype(dtype_) {
    if (shape.size() != strides.size()) {
        contract_error("TensorView", "strides must have one entry for each of the " +
                                         std::to_string(shape.size()) + " dimensions of shape " +
                                         tuple_text(shape) + ", got " + tuple_text(strides));
    }
    for (int64_t size : shape) {
        if (size < 0) contract_error("TensorView", "sizes must not be negative, got " + tuple_text(shape));
    }
    if (data == nullptr && numel() > 0) {
        contract_error("TensorView", "the address must not be 0 for a tensor of shape " + tuple_text(shape));
    }
    if (address % static_cast<uintptr_t>(dtype_size(dtype)) != 0) {
        contract_error("TensorView", std::string("the address must be a multiple of the ") +
                                         dtype_name(dtype) + " size, " + std::to_string(dtype_size(dtype)) +
                                         ", got " + std::to_string(address));
    }
}

int64_t TensorView::numel() const {
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    return count;
}

std::string TensorView::shape_text() const {
    return tuple_text(shape);
}

void contract_error(const char* op, const std::string& message) {
    throw std::invalid_argument(std::string(op) + ": " + message);
}

void check_dtype(const char* op, const char* name, const TensorView& view,
                 std::initializer_list<DType> wanted) {
    if (std::find(wanted.begin(), wanted.end(), view.dtype) != wanted.end()) return;
    std::string names;
    for (DType dtype : wanted) names += (names.empty() ? "" : ", ") + std::string(dtype_name(dtype));
    contract_error(op, std::string(name) + " must be " + (wanted.size() > 1 ? "one of " : "") + names +
                           ", got " + dtype_name(view.dtype));
}

void check_shape(const char* op, const char* name, const TensorView& view,
                 std::initializer_list<Dim> wanted) {
    bool same = view.shape.size() == wanted.size();
    std::string text;
    size_t axis = 0;
    for (const Dim& dim : wanted) {
        same = same && (dim.size == any_size || view.shape[axis] == dim.size);
        text += (axis > 0 ? ", " : "") + (dim.size == any_size ? dim.letter : std::to_string(dim.size));
        ++axis;
    }
    if (same) return;
    if (axis == 1) text += ",";
    contract_error(op, std::string(name) + " must have shape (" + text + "), got " + view.shape_text());
}

void check_contiguous(const char* op, const char* name, const TensorView& view) {
    int64_t stride = 1;
    for (size_t axis = view.shape.size(); axis-- > 0;) {
        if (view.shape[axis] > 1 && view.strides[axis] != stride && view.numel() > 0) {
            contract_error(op, std::string(name) + " must be contiguous, got shape " + view.shape_text() +
                                   " with strides " + tuple_text(view.strides));
        }
        stride *= view.shape[axis];
    }
}

void check_output(const char* op, const char* name, const TensorView& view) {
    std::vector<std::pair<int64_t, int64_t>> axes;  // (stride, size), smallest stride first
    for (size_t axis = 0; axis < view.shape.size(); ++axis) {
        if (view.shape[axis] > 1) axes.emplace_back(view.strides[axis], view.shape[axis]);
    }
    std::sort(axes.begin(), axes.end());
    int64_t next_free = 1;
    for (const auto& [stride, size] : axes) {
        if (stride < next_free && view.numel() > 0) {
            contract_error(op, std::string(name) + " must not overlap itself, got shape " +
                                   view.shape_text() + " with strides " + tuple_text(view.strides));
        }
        next_free = stride * (size - 1) + next_free;
    }
}

}  // namespace var_ext
