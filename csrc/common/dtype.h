// Element types of the tensors that cross the binding.
#pragma once

#include <cstdint>

namespace var_ext {

enum class DType { float32, float64, bfloat16, float16, int64, uint8 };

const char* dtype_name(DType dtype);
int64_t dtype_size(DType dtype);  // bytes

}  // namespace var_ext
