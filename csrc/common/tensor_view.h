// A borrowed strided tensor, and the checks that report a broken contract readably.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace var_ext {

struct TensorView {
    void* data;                    // borrowed: the caller keeps it alive during the call
    std::vector<int64_t> shape;    // sizes
    std::vector<int64_t> strides;  // in elements
    DType dtype;

    TensorView(uintptr_t address, std::vector<int64_t> shape, std::vector<int64_t> strides, DType dtype);

    int64_t dim() const { return static_cast<int64_t>(shape.size()); }
    int64_t numel() const;
    std::string shape_text() const;  // "(4096, 32)"
};

// All of these throw std::invalid_argument (ValueError in Python) with a message "OP: wanted ..., got ...".
[[noreturn]] void contract_error(const char* op, const std::string& message);
void check_dtype(const char* op, const char* name, const TensorView& view,
                 std::initializer_list<DType> wanted);
// Each dimension has a letter and the size it must have, or any_size: {{"V", any_size}, {"C", 32}}.
struct Dim {
    const char* letter;
    int64_t size;
};
constexpr int64_t any_size = -1;
void check_shape(const char* op, const char* name, const TensorView& view, std::initializer_list<Dim> wanted);
void check_contiguous(const char* op, const char* name, const TensorView& view);
// Two elements of an output must not share memory, or threads would race.
void check_output(const char* op, const char* name, const TensorView& view);

}  // namespace var_ext
